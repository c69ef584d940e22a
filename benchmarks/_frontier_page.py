"""The tables and the picture of `frontier.py`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from _memory_page import Row, mib, table

from revnet._figure import clear_frame, new_figure, save, write_title
from revnet._palette import CHECKPOINT_RECURSIVE, GRAY, REVERSIBLE, STORED

SHARES = {"a tenth": 0.1, "a fifth": 0.2, "a third": 1 / 3, "half": 0.5, "two thirds": 2 / 3}
MARGIN = 0.01
"""Part of the stored twin's bytes by which a variant may exceed a share."""
_COLORS = {"revnet": REVERSIBLE, "checkpoint": STORED, "selective": CHECKPOINT_RECURSIVE, "library": GRAY}
_LABELS = {
    "revnet": "revnet",
    "checkpoint": "torch.utils.checkpoint",
    "selective": "selective checkpoint",
    "library": "other libraries",
}


def frontier_sections(rows: Sequence[Row]) -> list[str]:
    """Return a section for each workload and precision."""
    lines = []
    for workload, precision in dict.fromkeys((row["workload"], row["precision"]) for row in rows):
        lines += _section([row for row in rows if (row["workload"], row["precision"]) == (workload, precision)])
    return lines


def _section(rows: Sequence[Row]) -> list[str]:
    twin, *others = rows
    timed = [row for row in others if row["ratio"] != ""]
    return [
        f"## {twin['workload']}, {twin['precision']}",
        "",
        f"The stored twin needs {mib(twin['activation_bytes'])} MiB and {1000 * twin['step_seconds']:,.0f} ms.",
        "",
        *table(
            ("variant", "MiB", "of the twin", "time", "quartiles"),
            [_cells(row) for row in sorted(timed, key=lambda row: (row["family"] != "revnet", row["share"]))],
        ),
        *[f"- {row['variant']}: {row['note']}\n" for row in others if row["note"]],
        "The fastest variant within each share of the twin's bytes:",
        "",
        *table(
            ("share", *_LABELS.values()),
            [[name, *[_fastest(timed, kind, share) for kind in _LABELS]] for name, share in SHARES.items()],
        ),
        "For each checkpoint, the time of revnet's fastest variant with at most its bytes (and 0.1 %, for statistics",
        "of batch norm), and the bytes of revnet's smallest variant with at most its time:",
        "",
        *table(("checkpoint", "MiB", "time", "revnet's time", "revnet's MiB"), list(_comparisons(timed))),
    ]


def kind_of(row: Row) -> str:
    """Return the kind of a variant, for colors and columns."""
    is_selective = str(row["variant"]).startswith("selective")
    return "selective" if is_selective else str(row["family"]).removeprefix("torch.utils.")


def _cells(row: Row) -> list[str]:
    quartiles = f"{row['ratio_first_quartile']:.2f}-{row['ratio_third_quartile']:.2f}"
    return [row["variant"], mib(row["activation_bytes"]), f"{row['share']:.0%}", f"{row['ratio']:.2f}", quartiles]


def _fastest(rows: Sequence[Row], kind: str, share: float) -> str:
    within = [row for row in rows if kind_of(row) == kind and row["share"] <= share + MARGIN]
    if not within:
        return ""
    best = min(within, key=lambda row: row["ratio"])
    return f"{best['ratio']:.2f} at {best['share']:.0%} ({best['variant']})"


def _comparisons(rows: Sequence[Row]) -> Iterator[list[str]]:
    own = [row for row in rows if row["family"] == "revnet"]
    for row in rows:
        if row["family"] != "torch.utils.checkpoint":
            continue
        ratios = [other["ratio"] for other in own if other["activation_bytes"] <= 1.001 * row["activation_bytes"]]
        sizes = [other["activation_bytes"] for other in own if other["ratio"] <= row["ratio"]]
        ratio, size = f"{min(ratios):.2f}" if ratios else "", mib(min(sizes)) if sizes else ""
        yield [row["variant"], mib(row["activation_bytes"]), f"{row['ratio']:.2f}", ratio, size]


def plot_frontier(rows: Sequence[Row], path: Path) -> None:
    """Draw step time against memory, with one panel for each workload and precision."""
    settings = list(dict.fromkeys((row["workload"], row["precision"]) for row in rows))
    num_rows = (len(settings) + 1) // 2
    figure = new_figure(10, 3.4 * num_rows)
    panels = figure.subplots(num_rows, 2, squeeze=False).flat
    for axes, setting in zip(panels, settings, strict=False):
        own = [row for row in rows if (row["workload"], row["precision"]) == setting and row["ratio"] != ""]
        for kind, label in _LABELS.items():
            points = sorted((100 * row["share"], row["ratio"]) for row in own if kind_of(row) == kind)
            if points:
                axes.plot(*zip(*points, strict=True), "o", color=_COLORS[kind], label=label, markersize=4)
            if points and kind == "revnet":
                axes.plot(*zip(*_best_so_far(points), strict=True), color=_COLORS[kind], linewidth=1)
        axes.set_xlim(0, 105)
        axes.set_ylim(0.95, 1.45)  # Steps of some libraries take longer.
        axes.set_xlabel("memory (% of the stored twin)")
        axes.set_ylabel("step time over the twin's")
        clear_frame(axes)
        write_title(axes, ", ".join(setting))
    for axes in list(panels)[len(settings) :]:
        axes.set_axis_off()
    handles = {label: line for ax in figure.axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    save(figure, path)


def _best_so_far(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    best = float("inf")
    for share, ratio in points:
        if ratio < best:
            best = ratio
            yield share, ratio
