"""The figure of the gradient-angle study: angles, losses and validation errors."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from revnet._figure import save, write_title
from revnet._palette import GRAY, REVERSIBLE, STORED
from revnet.paper._panels import legend_below, new_panels
from revnet.paper.gradient_angle.gradients import ALL
from revnet.paper.gradient_angle.study import AngleStudy

_ALL_COLOR = "#000000"
_STYLES: dict[str, dict[str, Any]] = {
    "reversed": {"color": REVERSIBLE, "linewidth": 2.2},
    "stored": {"color": STORED, "linestyle": (0, (4, 2))},
}
_SMOOTHING = 30
"""Number of independent points in a smoothed curve."""


def plot(study: AngleStudy, path: Path) -> None:
    """Draw the angle of each group by update, and the curves of both runs."""
    has_validation = bool(study.reversed.val_errors)
    figure, (angles, losses, *errors) = new_panels(3 if has_validation else 2)
    _plot_angles(angles, study)
    _plot_losses(losses, study)
    for axes in errors:
        _plot_validation(axes, study)
    for axes in (angles, losses, *errors):
        axes.set_xlabel("update")
        axes.set_xlim(0, len(study.reversed.losses) * 1.02)
        _mark_drops(axes, study)
        legend_below(axes)
    figure.suptitle(f"{study.config.model} on {study.reversed.result.test.data}", fontsize="medium", x=0.01, ha="left")
    save(figure, path)


def _plot_angles(axes: Any, study: AngleStudy) -> None:
    write_title(axes, "rebuilt gradients against stored ones")
    axes.set_ylabel("angle (degrees)")
    parts = [group for group in study.groups if group != ALL]
    colors = _colors(len(parts))
    for group, color in [*zip(parts, colors, strict=True), (ALL, _ALL_COLOR)]:
        errors = study.errors_of(group)
        # A logarithmic axis cannot show zero.
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
        label = "all, stored, against float64"
        axes.plot(*zip(*reference, strict=True), color=GRAY, linestyle="--", linewidth=1.6, label=label)
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


def _mark_drops(axes: Any, study: AngleStudy) -> None:
    """Mark the updates at which the learning rate drops."""
    if study.config.schedule != "step":
        return
    for index, fraction in enumerate(study.config.decay_at):
        label = "learning rate drops" if index == 0 else None
        at = fraction * len(study.reversed.losses)
        axes.axvline(at, color=GRAY, linewidth=0.8, linestyle=":", label=label)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each `window` consecutive values."""
    sums = [0.0, *accumulate(values)]
    return [(end - start) / window for start, end in zip(sums, sums[window:], strict=False)]


def _colors(count: int) -> list[Any]:
    """Return colors from light to dark, in the order of the network's parts."""
    from matplotlib import colormaps

    return [colormaps["viridis_r"](0.12 + 0.78 * index / max(1, count - 1)) for index in range(count)]
