"""Plot the training curves of all runs of a table."""

import csv
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from revnet._figure import clear_frame, new_figure, save, set_log_scale, write_title
from revnet._palette import BLUE, CYAN, GREEN, PURPLE, RED, YELLOW
from revnet.errors import CheckpointError
from revnet.training.run.run_dir import LOG

_COLORS = (BLUE, RED, GREEN, YELLOW, PURPLE, CYAN)
_COLUMNS = ("epoch", "train_loss", "train_accuracy")
_QUICK = 10
"""Number of epochs below which each is marked."""

Curve = dict[str, list[float]]
"""Epochs, losses and accuracies of a run."""


def read_curve(folder: Path) -> Curve:
    """Return the log of a run.

    Raises:
        CheckpointError: The log is missing or damaged.
    """
    path = folder / LOG
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("no epoch")
        return {name: [float(row[name]) for row in rows] for name in _COLUMNS}
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise CheckpointError(
            f"`{path}` is missing or damaged, so its curve is not drawn; restore the file."
        ) from error


def plot_curves(runs: Sequence[tuple[str, float, Curve]], path: Path, title: str) -> None:
    """Plot the loss and the error of each run in training, and mark the test error after the last epoch.

    Runs of one model share a color.

    Args:
        runs: Model, test error in percent and curve of each run.
        path: File of the picture.
        title: Title of the picture.
    """
    colors = dict(zip(dict.fromkeys(model for model, *_ in runs), cycle(_COLORS), strict=False))
    figure = new_figure(10, 4.2)
    losses, errors = figure.subplots(1, 2)
    labeled: set[str] = set()
    for model, test_error, curve in runs:
        style: dict[str, Any] = {"color": colors[model], "linewidth": 1.4}
        if len(curve["epoch"]) < _QUICK:
            style["marker"] = "."
        label = None if model in labeled else model
        labeled.add(model)
        losses.plot(curve["epoch"], curve["train_loss"], label=label, **style)
        errors.plot(curve["epoch"], [100 * (1 - accuracy) for accuracy in curve["train_accuracy"]], **style)
        errors.plot(curve["epoch"][-1:], [test_error], color=colors[model], marker="D", markerfacecolor="white")
    write_title(losses, "training loss")
    write_title(errors, "error in training, and on the test set (diamonds), %")
    for axes in (losses, errors):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        clear_frame(axes)
    losses.set_ylabel("cross-entropy")
    lowest = min(min(test_error, *(1 - value for value in curve["train_accuracy"])) for _, test_error, curve in runs)
    if lowest > 0:  # A logarithmic axis cannot show zero.
        set_log_scale(errors)
    figure.suptitle(title, fontsize="medium", x=0.01, ha="left")
    figure.legend(loc="outside upper right", ncols=6, frameon=False)
    save(figure, path)
