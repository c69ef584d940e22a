"""A part of `gpu.py`: the published networks, their stored twins and their ordinary counterparts."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from _gpu_nets import OPTIMIZER, inputs_of, make, training_step
from _gpu_part import Part, Setting
from _gpu_step import Turn, attempt, median_ratio, release, take_turns, watch
from _memory_page import Row, mib, table

from revnet import AbstractPolicy, Store

SECONDS = 8.0
"""Time for the rounds of one group."""
TWIN = "stored twin"


class Group(NamedTuple):
    """Networks that are timed in turn."""

    reversible: str
    ordinary: str
    """Ordinary network of about the same size."""
    batch_size: int


GROUPS = (
    Group("revnet38", "resnet32", 100),
    Group("revnet110", "resnet110", 100),
    Group("revnet164", "resnet164", 100),
    Group("revnet104", "resnet101", 32),
)
QUICK_GROUPS = (Group("tiny revnet", "tiny resnet", 2),)


def rows(setting: Setting) -> Iterator[Row]:
    """Measure each group."""
    for group in QUICK_GROUPS if setting.quick else GROUPS:
        yield from _measure(group, setting)
        release(setting.device)


def _measure(group: Group, setting: Setting) -> Iterator[Row]:
    torch.manual_seed(0)
    x = inputs_of(group.reversible, group.batch_size).to(setting.device)
    variants: dict[str, tuple[str, AbstractPolicy | None]] = {
        group.reversible: (group.reversible, None),
        f"{group.reversible}, {TWIN}": (group.reversible, Store()),
        group.ordinary: (group.ordinary, None),
    }
    steps: dict[str, Callable[[], object]] = {}
    known: dict[str, Row] = {}
    for variant, (name, policy) in variants.items():
        model = make(name, policy).to(setting.device)
        step = partial(training_step, model, x, OPTIMIZER(model.parameters()))
        note = attempt(lambda step=step: (step(), step()), setting.device)
        known[variant] = {"grown_bytes": None, "note": note}
        if not note:
            known[variant]["grown_bytes"] = watch(step, setting.device).grown_bytes
            steps[variant] = step
    turns = take_turns(steps, setting, seconds=SECONDS)
    for variant, row in known.items():
        times = _times(turns, variant, f"{group.reversible}, {TWIN}", group.batch_size)
        yield {"network": variant, "batch": group.batch_size, "pixels": x.shape[-1], **times, **row}


def _times(turns: dict[str, list[Turn]], name: str, twin: str, batch_size: int) -> dict[str, Any]:
    if name not in turns:
        return {"step_ms": None, "images_per_second": None, "ratio": None, "host_ms": None}
    seconds = [turn.step_seconds for turn in turns[name]]
    reference = [turn.step_seconds for turn in turns.get(twin, [])]
    return {
        "rounds": len(seconds),
        "step_ms": 1e3 * statistics.median(seconds),
        "images_per_second": batch_size / statistics.median(seconds),
        "ratio": median_ratio(seconds, reference) if reference else None,
        "host_ms": 1e3 * statistics.median([turn.host_seconds for turn in turns[name]]),
    }


def lines(rows_of_part: Sequence[Row]) -> list[str]:
    """Return the lines of the table."""
    columns = ("network", "batch", "pixels", "images/s", "step, ms", "step / twin", "host, ms", "peak, MiB")
    return [
        "Training steps with SGD and momentum in float32, channels-last. The networks of a group are timed in turn:",
        "the reversible network, its stored twin and the ordinary network of its size. *Step / twin* is the median",
        "over rounds of the ratio within the round; *host* is the processor time until all kernels are launched;",
        "*peak* is the peak minus the memory allocated before the step.",
        "",
        *table(columns, [_cells(row) for row in rows_of_part]),
    ]


def _cells(row: Row) -> list[str]:
    start = [row["network"], str(row["batch"]), str(row["pixels"])]
    if row["step_ms"] is None:
        return [*start, row["note"], "", "", "", ""]
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    times = [f"{row['images_per_second']:,.0f}", f"{row['step_ms']:.1f}", ratio, f"{row['host_ms']:.1f}"]
    return [*start, *times, mib(row["grown_bytes"])]


MODELS = Part("models", "Published networks", 90, rows, lines)
