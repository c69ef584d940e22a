"""The picture of the gradient-angle study: angles, losses, validation errors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from revnet._figure import save, write_title
from revnet.paper._picture import legend_below, new_panels
from revnet.paper.gradient_angle import ALL
from revnet.paper.gradient_angle_study import AngleStudy

_ALL_COLOR, _GREY = "#000000", "#888888"
_STYLES: dict[str, dict[str, Any]] = {
    "reversed": {"color": "#0055aa", "linewidth": 2.2},
    "stored": {"color": "#ee7733", "linestyle": (0, (4, 2))},
}
_SMOOTHING = 30
"""Points that a smoothed curve tells apart."""


def plot(study: AngleStudy, path: Path) -> None:
    """Draw the angle of each group by update, and the curves of both runs over each other."""
    has_validation = bool(study.reversed.val_errors)
    figure, (angles, losses, *errors) = new_panels(3 if has_validation else 2)
    _plot_angles(angles, study)
    _plot_losses(losses, study)
    for axes in errors:
        _plot_validation(axes, study)
    for axes in (angles, losses, *errors):
        axes.set_xlabel("update")
        axes.set_xlim(0, len(study.reversed.losses) * 1.02)
        _mark_falls(axes, study)
        legend_below(axes)
    figure.suptitle(f"{study.config.model} on {study.reversed.result.test.data}", fontsize="medium", x=0.01, ha="left")
    save(figure, path)


def _plot_angles(axes: Any, study: AngleStudy) -> None:
    write_title(axes, "rebuilt gradients beside stored ones")
    axes.set_ylabel("angle (degrees)")
    parts = [group for group in study.groups if group != ALL]
    colors = _colors(len(parts))
    for group, color in [*zip(parts, colors, strict=True), (ALL, _ALL_COLOR)]:
        errors = study.errors_of(group)
        # A logarithmic axis has no place for zero.
        points = [(update, error.angle_degrees) for update, error in errors.items() if error.angle_degrees > 0]
        label = "all parameters" if group == ALL else group
        width = 2.2 if group == ALL else 1.2
        axes.plot(
            *(zip(*points, strict=True) if points else ([], [])),
            color=color,
            linewidth=width,
            marker="o",
            markersize=2 + width,
            label=label if points else f"{label}: 0 throughout",
        )
    reference = [
        (update, error.reference_angle_degrees)
        for update, error in study.errors_of(ALL).items()
        if error.reference_angle_degrees
    ]
    if reference:
        label = "all, stored, beside float64"
        axes.plot(*zip(*reference, strict=True), color=_GREY, linestyle="--", linewidth=1.6, label=label)
    if any(error.angle_degrees > 0 for errors in study.errors.values() for error in errors):
        axes.set_yscale("log")


def _plot_losses(axes: Any, study: AngleStudy) -> None:
    window = max(1, len(study.reversed.losses) // _SMOOTHING)
    write_title(axes, "training loss")
    axes.set_ylabel("cross-entropy" if window == 1 else f"cross-entropy, mean of {window} updates")
    for name, run in study.runs.items():
        means = _running_mean(run.losses, window)
        axes.plot(range(window, window + len(means)), means, label=name, **_STYLES[name])
    if all(loss > 0 for run in study.runs.values() for loss in run.losses):
        axes.set_yscale("log")


def _plot_validation(axes: Any, study: AngleStudy) -> None:
    write_title(axes, "validation error")
    axes.set_ylabel("error (%)")
    for name, run in study.runs.items():
        percent = [100 * error for error in run.val_errors.values()]
        marker = "o" if len(percent) < 10 else None
        axes.plot(list(run.val_errors), percent, label=name, marker=marker, **_STYLES[name])
    axes.set_ylim(bottom=0)


def _mark_falls(axes: Any, study: AngleStudy) -> None:
    """Draw where the learning rate falls by steps."""
    if study.config.schedule != "step":
        return
    for index, fraction in enumerate(study.config.decay_at):
        label = "learning rate falls" if index == 0 else None
        at = fraction * len(study.reversed.losses)
        axes.axvline(at, color=_GREY, linewidth=0.8, linestyle=":", label=label)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each `window` consecutive values."""
    sums = [0.0, *accumulate(values)]
    return [(end - start) / window for start, end in zip(sums, sums[window:], strict=False)]


def _colors(count: int) -> list[Any]:
    """Colours from light to dark, in the order of the network's parts."""
    from matplotlib import colormaps

    return [colormaps["viridis_r"](0.12 + 0.78 * index / max(1, count - 1)) for index in range(count)]
