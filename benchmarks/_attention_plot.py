"""The figures of `attention.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _memory_page import MIB, Row

from revnet._figure import clear_frame, new_figure, save, write_title
from revnet._palette import GRAY, REVERSIBLE, STORED

COLORS = {"full": GRAY, "lsh": STORED, "hierarchical": REVERSIBLE}


def plot_cost(rows: Sequence[Row], orders: Mapping[str, str], path: Path) -> None:
    """Draw time, arithmetic and memory of one layer against the length, on logarithmic axes."""
    figure = new_figure(10, 3.6)
    panels = (
        ("seconds", "time", "s", 1.0),
        ("flops", "arithmetic of products", "GFLOP", 1e9),
        ("activation_bytes", "peak memory", "MiB", MIB),
    )
    lengths = sorted({row["length"] for row in rows})
    for axes, (key, title, unit, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, order in orders.items():
            values = [row[key] / scale for row in rows if row["attention"] == name]
            label = f"{name}, ${order.replace('log', chr(92) + 'log')}$"
            axes.plot(lengths, values, color=COLORS[name], marker="o", label=label)
        _by_length(axes, lengths)
        _by_value(axes)
        axes.set_ylabel(unit)
        write_title(axes, title)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def plot_models(rows: Sequence[Row], path: Path) -> None:
    """Draw peak memory by depth at the largest length, and by length at the largest depth."""
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    lengths, depths = (sorted({row[key] for row in rows}) for key in ("length", "depth"))
    for axes, key, fixed, at in ((left, "depth", "length", lengths[-1]), (right, "length", "depth", depths[-1])):
        for name, color in COLORS.items():
            for way, style in (("reversible", "-"), ("stored", ":")):
                selected = [row for row in rows if (row["attention"], row["way"], row[fixed]) == (name, way, at)]
                axes.plot(
                    [row[key] for row in selected],
                    [row["activation_bytes"] / MIB for row in selected],
                    color=color,
                    linestyle=style,
                    marker="o",
                    label=f"{name}, {way}",
                )
        axes.set_ylabel("peak memory of a step (MiB)")
    left.set_ylim(bottom=0)
    left.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    _by_value(right)
    left.set_xticks(depths)
    left.set_xlabel("blocks")
    clear_frame(left)
    _by_length(right, lengths)
    write_title(left, f"{lengths[-1]:,} tokens")
    write_title(right, f"{depths[-1]} blocks")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def _by_length(axes: Any, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize="small")
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    clear_frame(axes)


def _by_value(axes: Any) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_minor_formatter(lambda *_: "")
