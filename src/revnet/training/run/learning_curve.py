"""The plot of the learning curve."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from revnet._figure import clear_frame, new_figure, plain, save, set_log_scale
from revnet._palette import BLUE, GRAY, RED
from revnet.training.run.callbacks import Row


def plot_learning_curve(rows: Sequence[Row], path: Path, title: str, *, loss_name: str = "cross-entropy") -> None:
    """Plot loss and accuracy, if there is one, against epochs, and mark the steps of the learning rate."""
    has_accuracy = "train_accuracy" in rows[0]
    figure = new_figure(9 if has_accuracy else 6, 3.6)
    panels = list(figure.subplots(1, 1 + has_accuracy, squeeze=False)[0])
    epochs = [row["epoch"] for row in rows]
    for axes, quantity, scale in zip(panels, ("loss", "accuracy"), (1, 100), strict=False):
        for part, name, color in (("train", "training", BLUE), ("val", "validation", RED)):
            known = [row for row in rows if f"{part}_{quantity}" in row]  # Validation may be rarer than epochs.
            if known:
                values = [scale * row[f"{part}_{quantity}"] for row in known]
                marker = "o" if len(known) < 10 else None
                axes.plot([row["epoch"] for row in known], values, color=color, label=name, marker=marker)
        falls = [before["epoch"] + 0.5 for before, after in pairwise(rows) if after["lr"] < before["lr"]]
        is_stepwise = has_accuracy and len(falls) <= len(rows) / 2  # otherwise it falls in every epoch
        for epoch in falls if is_stepwise else []:
            label = "learning rate falls" if epoch == falls[0] else None
            axes.axvline(epoch, color=GRAY, linewidth=0.8, linestyle=":", label=label)
        axes.set_xlabel("epoch")
        axes.set_xlim(0, 1.03 * epochs[-1])
        axes.xaxis.get_major_locator().set_params(integer=True)
        clear_frame(axes)
    panels[0].set_ylabel(loss_name)
    if has_accuracy:
        if any(row["train_loss"] > 0 for row in rows):
            set_log_scale(panels[0])
        panels[1].set_ylabel("accuracy (%)")
    figure.text(0.01, 0.95, plain(title), va="center", fontsize="large")  # in the row of the legend
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    save(figure, path)
