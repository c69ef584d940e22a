"""A part of `gpu.py`: step time against memory by policy."""

import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from _gpu_part import Part, Setting
from _gpu_ratios import DEPTH, SIZES, step_of
from _gpu_step import attempt, median_ratio, release, take_turns, watch
from _memory_page import Row, mib, table
from torch import Tensor

from revnet import AbstractPolicy, Checkpoint, Offload, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.bench.cases import Case

SECONDS = 6.0
"""Time for the rounds of one case."""
POLICIES: Sequence[AbstractPolicy] = (
    Store(),
    Reverse(),
    Reverse(hold="f"),
    Reverse(hold=True),
    Reverse(hold=True, keep=("convolution", "attention")),
    Reverse(keep=("convolution", "linear", "attention")),
    Checkpoint(),
    Offload(),
    Offload(overlap=True),
)
"""The policies to measure, `Store()` first. To add one, add it here."""


def rows(setting: Setting) -> Iterator[Row]:
    """Measure each case with each policy."""
    for case in SIZES["tiny" if setting.quick else "saturating"]:
        yield from _measure(case, setting)
        release(setting.device)


def _measure(case: Case, setting: Setting) -> Iterator[Row]:
    functions = case.functions(2 if setting.quick else DEPTH, setting.device)
    x = torch.cat(case.streams(1), case.split_dim).to(setting.device).requires_grad_()
    steps: dict[str, Callable[[], None]] = {}
    known: dict[str, Row] = {}
    expected: list[Tensor] = []
    for policy in POLICIES:
        blocks = [ReversibleBlock(f, g, split_dim=case.split_dim) for f, g in functions]
        module = ReversibleSequential(*blocks, policy=policy)
        step = step_of(module, x, functions)
        row: Row = {"difference": None, "grown_bytes": None}
        row["note"] = attempt(lambda step=step: (step(), step()), setting.device)
        if not row["note"]:
            parameters = list(module.parameters())
            grads = torch.autograd.grad(module(x).square().mean(), [x, *parameters])
            expected = expected or list(grads)
            row["difference"] = max(map(_difference, grads, expected))
            del grads
            row["grown_bytes"] = watch(step, setting.device).grown_bytes
            steps[str(policy)] = step
        known[str(policy)] = row
    turns = take_turns(steps, setting, seconds=SECONDS)
    reference = [turn.step_seconds for turn in turns.get(str(POLICIES[0]), [])]
    for name, row in known.items():
        seconds = [turn.step_seconds for turn in turns.get(name, [])]
        times = {
            "step_ms": 1e3 * statistics.median(seconds) if seconds else None,
            "ratio": median_ratio(seconds, reference) if seconds and reference else None,
        }
        yield {"case": case.name, "description": case.description, "policy": name, **times, **row}


def _difference(grad: Tensor, expected: Tensor) -> float:
    """Return the relative difference; 0 if all bits are equal."""
    if torch.equal(grad, expected):
        return 0.0
    return float((grad - expected).norm() / expected.norm().clamp_min(1e-30))


def lines(rows_of_part: Sequence[Row]) -> list[str]:
    """Return the lines of a table for each case."""
    page = [
        "A step is the forward pass, `y.square().mean()` and the backward pass of a reversible sequence in float32.",
        "The policies are timed in turn. *Difference*: the largest relative difference of a gradient from the one with",
        "`Store()`. *Peak*: the peak minus the memory before the step.",
        "",
    ]
    for description in dict.fromkeys(row["description"] for row in rows_of_part):
        own = [row for row in rows_of_part if row["description"] == description]
        columns = (f"{own[0]['case']}: {description}", "step, ms", "step / `Store()`", "peak, MiB", "difference")
        page += table(columns, [_cells(row) for row in own])
    return page


def _cells(row: Row) -> list[str]:
    if row["note"] or row["step_ms"] is None:
        return [f"`{row['policy']}`", row["note"], "", "", ""]
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    difference = f"{row['difference']:.1e}" if row["difference"] else "none"
    return [f"`{row['policy']}`", f"{row['step_ms']:.2f}", ratio, mib(row["grown_bytes"]), difference]


BY_POLICY = Part("policies", "Step time and memory by policy", 60, rows, lines)
