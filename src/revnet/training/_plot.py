"""The picture of the learning curve."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from revnet.training._files import atomic_path
from revnet.training.callbacks import Row

_TRAINING, _VALIDATION, _GREY = "#4477aa", "#ee6677", "#888888"


def plot_learning_curve(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw loss and accuracy against epochs, with a mark where the learning rate falls."""
    # The figure is made without pyplot, which would choose a window system and keep the figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    for axes, quantity, scale in ((losses, "loss", 1), (accuracies, "accuracy", 100)):
        for part, name, color in (("train", "training", _TRAINING), ("val", "validation", _VALIDATION)):
            if f"{part}_{quantity}" in rows[0]:
                values = [scale * row[f"{part}_{quantity}"] for row in rows]
                axes.plot(epochs, values, color=color, label=name, marker="o" if len(rows) == 1 else None)
        for before, after in pairwise(rows):
            if after["lr"] < before["lr"]:
                axes.axvline(before["epoch"] + 0.5, color=_GREY, linewidth=0.8, linestyle=":")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    losses.set_ylabel("cross-entropy")
    losses.set_yscale("log")
    accuracies.set_ylabel("accuracy (%)")
    accuracies.legend(frameon=False, loc="lower right")
    figure.suptitle(title, fontsize="medium")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
