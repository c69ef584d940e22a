"""Draw the picture of the front page from a stored result of `revnet bench`: peak memory against depth, four lines.

    python benchmarks/front_page.py

The numbers are the convolutional case of `results/engine_cpu2_2026-11-30.csv`. Pass another CSV of `revnet bench`, or
another path for the picture, to use these instead.
"""

import argparse
import csv
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULT = HERE / "results" / "engine_cpu2_2026-11-30.csv"
PICTURE = HERE.parent / "docs" / "images" / "memory_by_depth.png"

CASE = "conv"
MIB = 2**20
LINES = {
    "plain": ("plain autograd", "#666666"),
    "checkpoint": ("checkpoint each block", "#cc5500"),
    "checkpoint sqrt": ("checkpoint groups of blocks", "#997700"),
    "revnet": ("revnet", "#0055aa"),
}
"""Label and color of each line, by the name of the method in the CSV."""


def read_peaks(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the points of each line: depth and peak in MiB, in the order of depth."""
    peaks: dict[str, list[tuple[int, float]]] = {name: [] for name in LINES}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            is_peak = (row["case"], row["quantity"]) == (CASE, "peak")
            method = row["method"] if "method" in row else row["contender"]  # as the column was called in older results
            if is_peak and method in peaks and row["value"]:
                peaks[method].append((int(row["depth"]), float(row["value"]) / MIB))
    return {name: sorted(points) for name, points in peaks.items()}


def draw(peaks: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Draw the lines, each with its label at its end."""
    figure = Figure(figsize=(7.6, 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    deepest = max(depth for points in peaks.values() for depth, _ in points)
    for name, (label, color) in LINES.items():
        points = peaks[name]
        is_ours = name == "revnet"
        axes.plot(*zip(*points, strict=True), color=color, linewidth=3.5 if is_ours else 2, solid_capstyle="round")
        depth, peak = points[-1]
        separator = (
            "\n" if name in ("plain", "checkpoint") else ": "
        )  # the two steep lines have little room next to them
        text = f"{label}{separator}{peak:,.0f} MiB"
        style = {"color": color, "fontsize": 11, "fontweight": "bold" if is_ours else "normal"}
        if depth < deepest:  # the line ends within the picture: its label follows it
            offset, alignment = (8, 4), {"ha": "left", "va": "top"}
        else:
            offset, alignment = (-2, 9), {"ha": "right", "va": "bottom"}
            if name == "checkpoint":  # a steep line: its label stands to the left of its end
                offset, alignment = (-64, 4), {"ha": "right", "va": "top"}
        axes.annotate(text, (depth, peak), offset, textcoords="offset points", **alignment, **style)
    axes.set_xlim(0, deepest * 1.02)
    axes.set_ylim(0)
    axes.set_xticks([0, 64, 128, 192, 256])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("reversible blocks", fontsize=11)
    axes.set_ylabel("peak activation memory, MiB", fontsize=11)
    axes.set_title("Activation memory of a training step", loc="left", fontsize=13, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(path, format="png")


def main() -> None:
    """Read the CSV and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path, default=RESULT)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    draw(read_peaks(arguments.result), arguments.picture)
    print(f"wrote {arguments.picture}")


if __name__ == "__main__":
    main()
