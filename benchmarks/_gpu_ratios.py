"""A part of `gpu.py`: the cost of a step on the host and the GPU, as ratios to plain autograd."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from _gpu_part import Part, Setting
from _gpu_step import Turn, attempt, median_ratio, release, take_turns, watch
from _memory_page import Row, mib, table
from torch import Tensor, nn

from revnet import Offload, ReversibleBlock, ReversibleSequential
from revnet.bench.cases import Attention, Case, FunctionPair, feed_forward
from revnet.bench.host_cases import HOST_METHODS, LOOP, Loop, conv_residual
from revnet.bench.methods import Method

DEPTH = 16
SECONDS = 8.0
"""Time for the rounds of one case."""
SIZES: dict[str, Sequence[Case]] = {
    "tiny": (
        Case("conv", "4 channels, 4x4, batch 1", lambda: (conv_residual(4), conv_residual(4)), (1, 4, 4, 4), 1),
        Case("transformer", "8 features, 4 tokens, batch 1", lambda: (Attention(8, 2), feed_forward(8)), (1, 4, 8), 2),
    ),
    "medium": (
        Case(
            "conv",
            "16 channels, 32x32, batch 100",
            lambda: (conv_residual(16), conv_residual(16)),
            (100, 16, 32, 32),
            1,
        ),
        Case(
            "transformer",
            "256 features, 256 tokens, batch 8",
            lambda: (Attention(256, 4), feed_forward(256)),
            (8, 256, 256),
            2,
        ),
    ),
    "saturating": (
        Case(
            "conv",
            "128 channels, 32x32, batch 64",
            lambda: (conv_residual(128), conv_residual(128)),
            (64, 128, 32, 32),
            1,
        ),
        Case(
            "transformer",
            "1024 features, 512 tokens, batch 8",
            lambda: (Attention(1024, 16), feed_forward(1024)),
            (8, 512, 1024),
            2,
        ),
    ),
}


class SavedOnCpu(nn.Module):
    """Plain autograd that keeps activations in host memory, which is pinned if there is a GPU."""

    def __init__(self, functions: Sequence[FunctionPair], split_dim: int):
        super().__init__()
        self.loop = Loop(functions, split_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks."""
        with torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda):
            return self.loop(x)


def _offload(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
    blocks = [ReversibleBlock(f, g, split_dim=split_dim) for f, g in functions]
    return ReversibleSequential(*blocks, policy=Offload())


METHODS: Sequence[Method] = (
    *[method for method in HOST_METHODS if method.package is None],
    Method("save_on_cpu", "`torch.autograd.graph.save_on_cpu` around the loop", SavedOnCpu),
    Method("revnet, Offload()", "the same sequence with `Offload()`", _offload),
)


def rows(setting: Setting) -> Iterator[Row]:
    """Measure each case at each size."""
    for size, cases in SIZES.items():
        if setting.quick and size != "tiny":
            return
        for case in cases:
            yield from _measure(size, case, setting)
            release(setting.device)


def _measure(size: str, case: Case, setting: Setting) -> Iterator[Row]:
    depth = 2 if setting.quick else DEPTH
    functions = case.functions(depth, setting.device)
    x = torch.cat(case.streams(1), case.split_dim).to(setting.device).requires_grad_()
    steps: dict[str, Callable[[], None]] = {}
    known: dict[str, Row] = {}
    for method in METHODS:
        step = step_of(method.make(functions, case.split_dim), x, functions)
        note = attempt(lambda step=step: (step(), step()), setting.device)
        known[method.name] = {"note": note, "grown_bytes": None}
        if not note:
            known[method.name]["grown_bytes"] = watch(step, setting.device).grown_bytes
            steps[method.name] = step
    turns = take_turns(steps, setting, seconds=SECONDS)
    for name, row in known.items():
        yield {"size": size, "case": case.name, "blocks": depth, "method": name, **_times(turns, name, depth), **row}


def step_of(module: nn.Module, x: Tensor, functions: Sequence[FunctionPair]) -> Callable[[], None]:
    """Return a step of `module`, which computes and then drops the gradients of the parameters and `x`."""
    leaves = [x, *[parameter for pair in functions for function in pair for parameter in function.parameters()]]

    def step() -> None:
        module(x).square().mean().backward()
        for leaf in leaves:
            leaf.grad = None

    return step


def _times(turns: dict[str, list[Turn]], name: str, depth: int) -> dict[str, Any]:
    if name not in turns or LOOP.name not in turns:
        return {"step_ms": None, "step_ratio": None, "host_ms": None, "host_ratio": None, "half_block_us": None}
    own, plain = turns[name], turns[LOOP.name]
    host = statistics.median([turn.host_seconds for turn in own])
    return {
        "rounds": len(own),
        "step_ms": 1e3 * statistics.median([turn.step_seconds for turn in own]),
        "step_ratio": median_ratio([turn.step_seconds for turn in own], [turn.step_seconds for turn in plain]),
        "host_ms": 1e3 * host,
        "host_ratio": median_ratio([turn.host_seconds for turn in own], [turn.host_seconds for turn in plain]),
        "half_block_us": 1e6 * host / (2 * depth),
    }


def lines(rows_of_part: Sequence[Row]) -> list[str]:
    """Return the lines of a table for each case and size."""
    page = [
        f"{rows_of_part[0]['blocks']} blocks in float32. A step is the forward pass, `y.square().mean()` and the",
        "backward pass; the input requires a gradient. In each round, every method runs one step to warm up and some",
        "timed steps; the order changes. Ratios are medians over rounds of the ratio to *plain* within the round.",
        "*Step*: time from the first launch until the GPU is done. *Host*: processor time of all threads until all",
        "kernels are launched, including waits for a full queue. *Peak*: the peak minus the memory before the step.",
        "",
        *[f"- {method.name}: {method.description}" for method in METHODS],
        "",
    ]
    columns = ("step, ms", "step / plain", "host, ms", "host / plain", "host, microseconds per half-block", "peak, MiB")
    for size, cases in SIZES.items():
        for case in cases:
            own = [row for row in rows_of_part if (row["size"], row["case"]) == (size, case.name)]
            if own:
                title = f"{case.name}, {size}: {case.description}"
                page += table((title, *columns), [_cells(row) for row in own])
    return page


def _cells(row: Row) -> list[str]:
    if row["note"] or row["step_ms"] is None:
        return [row["method"], row["note"] or "plain failed", "", "", "", "", ""]
    return [
        row["method"],
        f"{row['step_ms']:.2f}",
        f"{row['step_ratio']:.2f}",
        f"{row['host_ms']:.2f}",
        f"{row['host_ratio']:.2f}",
        f"{row['half_block_us']:.0f}",
        mib(row["grown_bytes"]),
    ]


RATIOS = Part("ratios", "Host and step time against plain autograd", 120, rows, lines)
