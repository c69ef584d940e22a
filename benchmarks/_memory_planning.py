"""The fourth table of `memory.py`: the processor time of plans by depth."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from _memory_page import Row, Section, mib, table
from torch import Tensor, nn

from revnet import ReversibleBlock, ReversibleSequential
from revnet.memory import plan
from revnet.models import ReversibleTransformer

OPTIMIZER = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def planning_section(depths: Sequence[int]) -> Section:
    """Time plans of models with convolutions and of transformers, by the number of blocks."""
    rows = [planned(name, make, depth) for depth in depths for name, make in MODELS.items()]
    columns = ("model", "blocks", "processor time, s", "peak, MiB", "step time")
    lines = [
        "## Processor time of plans",
        "",
        "The budget is the mean of the peaks of the plan with the least memory and of plain autograd. Step time is",
        "relative to plain autograd.",
        "",
        *table(columns, [_cells(row) for row in rows]),
    ]
    return Section(lines, rows)


def planned(name: str, make: Callable[[int], tuple[nn.Module, Tensor]], depth: int) -> Row:
    """Return the processor time and the result of the plan of one model."""
    with torch.device("meta"):
        model, x = make(depth)
    whole = plan(model, x, budget="1TiB", optimizer=OPTIMIZER)
    budget = (whole.points[0].peak_bytes + whole.points[-1].peak_bytes) // 2
    start = time.process_time()
    result = plan(model, x, budget=budget, optimizer=OPTIMIZER)
    return {
        "model": name,
        "num_blocks": depth,
        "processor_seconds": round(time.process_time() - start, 2),
        "peak_bytes": result.peak_bytes,
        "time_ratio": round(result.time_ratio, 4),
    }


def _conv_model(num_blocks: int) -> tuple[nn.Module, Tensor]:
    def function() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, bias=False))

    blocks = [ReversibleBlock(function(), function()) for _ in range(num_blocks)]
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), ReversibleSequential(*blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return model, torch.empty(32, 3, 32, 32)


def _transformer(num_blocks: int) -> tuple[nn.Module, Tensor]:
    model = ReversibleTransformer(vocab_size=256, dim=64, depth=num_blocks, num_heads=4, max_length=128)
    return model, torch.zeros(4, 128, dtype=torch.long)


MODELS = {"convolutions with batch norm": _conv_model, "transformer": _transformer}


def _cells(row: Row) -> list[str]:
    return [
        row["model"],
        str(row["num_blocks"]),
        f"{row['processor_seconds']:.1f}",
        mib(row["peak_bytes"]),
        f"{row['time_ratio']:.3f}",
    ]
