"""The second table of `memory.py`: predicted and measured memory and time of plans at several budgets."""

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _memory_page import MIB, Row, Section, mib, table
from _memory_step import OPTIMIZER, images_of, loss, make
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revnet import Checkpoint, Reverse, ReversibleSequential, Store, set_policy
from revnet._figure import clear_frame, new_figure, save, write_title
from revnet.bench.run import Quartiles
from revnet.memory import MeasuredTiming, Plan, RooflineTiming, measure, plan

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Budgets between the least memory of any plan (0) and the peak of plain autograd (1)."""
TIMINGS = {"counted": RooflineTiming(), "measured": MeasuredTiming()}
COLORS = {"counted": "#4477aa", "measured": "#aa3377"}
INK = "#333333"
MARKERS = {"plain autograd": "s", "checkpoint all": "D", "reverse all": "^", "torch.utils.checkpoint": "P"}


@dataclass(frozen=True)
class Way:
    """A way of running the model, with its predictions."""

    name: str
    model: nn.Module
    apply: Callable[[], object]
    """Function that sets the policies of the model."""
    budget_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    predicted_ratios: Mapping[str, float] = field(default_factory=dict)
    """Predicted ratio of the step time to plain autograd, by timing."""
    units: str = ""
    """Number of units with each policy."""


def plans_section(name: str, batch_size: int, num_rounds: int, picture: Path) -> Section:
    """Compare plans with single policies and PyTorch's checkpoint."""
    torch.manual_seed(0)
    model, images = make(name), images_of(name, batch_size)
    planned = partial(plan, model, images, optimizer=OPTIMIZER, loss=loss)
    whole = planned(budget=2**62)
    least, most = whole.points[0].peak_bytes, whole.references["plain autograd"].peak_bytes
    budgets = [least + round(share * (most - least)) for share in SHARES]
    plans = [{key: planned(budget=budget, timing=timing) for key, timing in TIMINGS.items()} for budget in budgets]
    ways = [*one_policy(model, plans[-1]), torch_checkpoint(name), *chosen(model, plans)]
    seconds = time_in_turns(ways, images, num_rounds)
    rows = [row_of(way, images, own, seconds[0]) for way, own in zip(ways, seconds, strict=True)]
    draw(plans[-1], rows, picture, title=f"{name}, batch {batch_size}")
    return Section(lines_of(name, batch_size, num_rounds, rows, picture), rows)


# Ways of running ------------------------------------------------------------------------------------------------------


def one_policy(model: nn.Module, plans: Mapping[str, Plan]) -> Iterator[Way]:
    """Yield plain autograd and the other single policies."""

    def reverse_all() -> None:
        set_policy(model, Checkpoint())  # for the stem, which is not reversible
        set_policy(model, Reverse())

    settings = {
        "plain autograd": partial(set_policy, model, Store()),
        "checkpoint all": partial(set_policy, model, Checkpoint()),
        "reverse all": reverse_all,
    }
    for name, apply in settings.items():
        points = {key: candidate.references[name] for key, candidate in plans.items() if name in candidate.references}
        if points:
            ratios = {key: point.time_ratio for key, point in points.items()}
            yield Way(name, model, apply, None, points["counted"].peak_bytes, ratios)


def torch_checkpoint(name: str) -> Way:
    """Return the model with PyTorch's checkpoint around each block."""
    model = make(name)
    set_policy(model, Store())
    for stage in model.stages:
        for child_name, child in list(stage.named_children()):
            if isinstance(child, ReversibleSequential):  # A block outside a sequence would be reversed.
                rows = [Checkpointed(ReversibleSequential(block, policy=Store())) for block in child]
                stage.add_module(child_name, nn.Sequential(*rows))
            else:
                stage.add_module(child_name, Checkpointed(child))
    return Way("torch.utils.checkpoint", model, lambda: None)


class Checkpointed(nn.Module):
    """A block that stores only its input."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Any) -> Any:
        """Run the block."""
        return checkpoint(self.block, x, use_reentrant=False)


def chosen(model: nn.Module, plans: Sequence[Mapping[str, Plan]]) -> Iterator[Way]:
    """Yield the plans of both timings at all budgets, or one plan if both are equal."""
    for share, by_timing in zip(SHARES, plans, strict=True):
        name, ratios = f"plan at {100 * share:.0f} %", {key: option.time_ratio for key, option in by_timing.items()}
        counted, measured = by_timing.values()
        if [unit.policy for unit in counted.units] == [unit.policy for unit in measured.units]:
            yield _of_plan(name, model, counted, ratios)
        else:
            for key, option in by_timing.items():
                yield _of_plan(f"{name}, {key}", model, option, {key: ratios[key]})


def _of_plan(name: str, model: nn.Module, chosen: Plan, ratios: Mapping[str, float]) -> Way:
    counts = Counter(type(unit.policy).__name__ for unit in chosen.units)
    units = ", ".join(f"{counts[kind]} {kind}" for kind in ("Reverse", "Checkpoint", "Store") if kind in counts)
    apply = partial(chosen.apply, model)
    return Way(name, model, apply, chosen.budget_bytes, chosen.peak_bytes, ratios, units)


# Measurements ---------------------------------------------------------------------------------------------------------


def time_in_turns(ways: Sequence[Way], images: Tensor, num_rounds: int) -> list[list[float]]:
    """Return the step times of each way, one per round. Rounds start with different ways. The first warms up."""
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(num_rounds + 1):
        start = turn % len(ways)
        for index in [*range(start, len(ways)), *range(start)]:
            way = ways[index]
            way.apply()
            way.model.zero_grad()
            gc.collect()  # so that a way does not pay for collecting another one's garbage
            begin = time.perf_counter()
            loss(way.model(images)).backward()
            seconds[index].append(time.perf_counter() - begin)
    return [times[1:] for times in seconds]


def row_of(way: Way, images: Tensor, seconds: Sequence[float], plain: Sequence[float]) -> Row:
    """Return the predictions and measurements of one way."""
    way.apply()
    counted = measure(way.model, images, optimizer=OPTIMIZER, loss=loss)
    ratio = Quartiles.of([step / reference for step, reference in zip(seconds, plain, strict=True)])
    return {
        "way": way.name,
        "budget_bytes": way.budget_bytes,
        "predicted_peak_bytes": way.predicted_peak_bytes,
        "counted_peak_bytes": counted.peak_bytes,
        "ratio_by_counting": way.predicted_ratios.get("counted"),
        "ratio_by_measuring": way.predicted_ratios.get("measured"),
        "step_seconds": statistics.median(seconds),
        "ratio_first_quartile": ratio.first,
        "ratio_median": ratio.median,
        "ratio_third_quartile": ratio.third,
        "units": way.units,
    }


# Page and figure ------------------------------------------------------------------------------------------------------


def lines_of(name: str, batch_size: int, num_rounds: int, rows: Sequence[Row], picture: Path) -> list[str]:
    """Return the lines of the page."""
    columns = ("", "budget, MiB", "predicted, MiB", "counted, MiB", "time by counting", "time by measuring")
    return [
        f"## Plans for {name}, batch {batch_size}",
        "",
        "Budgets lie between the least memory of any plan (0 %) and the peak of plain autograd (100 %). Times are",
        "ratios to plain autograd. *By counting* and *by measuring*: as `RooflineTiming` and `MeasuredTiming` predict",
        "them; for a plan, the timing that chose it. *Run*: the median over rounds of the ratio within the round, with",
        f"first and third quartile. There are {num_rounds} rounds after one to warm up; each starts with a different",
        "way. Plain autograd has `Store()` everywhere and runs without the engine; its step takes",
        f"{rows[0]['step_seconds']:.2f} s. `torch.utils.checkpoint` (`use_reentrant=False`) is around each block.",
        "",
        f"![{picture.name}]({picture.name})",
        "",
        *table((*columns, "run", "units"), [_cells(row) for row in rows]),
    ]


def _cells(row: Row) -> list[str]:
    ratios = [row["ratio_by_counting"], row["ratio_by_measuring"]]
    return [
        row["way"],
        *[mib(row[f"{quantity}_bytes"]) for quantity in ("budget", "predicted_peak", "counted_peak")],
        *["" if ratio is None else f"{ratio:.3f}" for ratio in ratios],
        f"{row['ratio_median']:.3f} ({row['ratio_first_quartile']:.3f}-{row['ratio_third_quartile']:.3f})",
        row["units"],
    ]


def draw(plans: Mapping[str, Plan], rows: Sequence[Row], picture: Path, *, title: str) -> None:
    """Draw time against memory: predictions as lines, measurements as points with quartiles."""
    figure = new_figure(7.5, 4.6)
    axes = figure.subplots()
    for key, option in plans.items():
        peaks, ratios = zip(*[(point.peak_bytes / MIB, point.time_ratio) for point in option.points], strict=True)
        label = f"the fastest plan that fits, by {key} times"
        axes.plot(peaks, ratios, drawstyle="steps-post", color=COLORS[key], linewidth=1.2, label=label)
    labels = set()
    for row in rows:
        way, peak = row["way"], row["counted_peak_bytes"] / MIB
        key = next((key for key in COLORS if way.endswith(key)), None)
        label = way if way in MARKERS else f"run: plans by {key or 'both'} times"
        color = COLORS[key] if key else INK
        axes.plot([peak] * 2, [row["ratio_first_quartile"], row["ratio_third_quartile"]], color=color, alpha=0.4)
        style = {"marker": MARKERS.get(way, "o"), "color": color, "markersize": 6, "linestyle": ""}
        axes.plot([peak], [row["ratio_median"]], label=None if label in labels else label, **style)
        labels.add(label)
    axes.set_xlim(left=0)
    axes.set_xlabel("peak memory of a step (MiB)")
    axes.set_ylabel("time of a step / of plain autograd")
    clear_frame(axes)
    write_title(axes, title)
    axes.legend(frameon=False, fontsize=8)
    save(figure, picture)
