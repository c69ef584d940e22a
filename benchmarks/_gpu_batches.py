"""A part of `gpu.py`: the largest predicted batch, and whether its step fits."""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from _gpu_nets import OPTIMIZER, inputs_of, loss_of, make, training_step
from _gpu_part import Part, Setting
from _gpu_step import attempt, release, synchronize, watch
from _memory_page import Row, mib, table

from revnet import AbstractPolicy, Store
from revnet.memory import max_batch_size, measure

SHARE = 0.9
"""Fraction of the free memory to use. The rest is for fragmentation and for memory that is not in tensors."""
QUICK_BUDGET = 2**20


class Network(NamedTuple):
    """A network whose largest batch is measured."""

    title: str
    name: str
    policy: AbstractPolicy | None = None


NETWORKS = (Network("resnet101", "resnet101"), Network("revnet104", "revnet104"))
QUICK_NETWORKS = (
    Network("tiny revnet", "tiny revnet"),
    Network("tiny revnet, stored twin", "tiny revnet", Store()),
)


def rows(setting: Setting) -> Iterator[Row]:
    """Find the largest batch of each network and run one step of it."""
    for network in QUICK_NETWORKS if setting.quick else NETWORKS:
        budget = QUICK_BUDGET
        if setting.device.type == "cuda":
            release(setting.device)
            budget = int(SHARE * torch.cuda.mem_get_info(setting.device)[0])
        with torch.device("meta"):
            model, x = make(network.name, network.policy), inputs_of(network.name, 4)
        start = time.perf_counter()
        batch = max_batch_size(model, x, budget=budget, optimizer=OPTIMIZER, loss=loss_of, device=setting.device)
        row = {"network": network.title, "pixels": x.shape[-1], "budget_bytes": budget, "batch": batch}
        row["search_seconds"] = time.perf_counter() - start
        yield row | _checked(network, batch, setting.device)
        release(setting.device)


def _checked(network: Network, batch: int, device: torch.device) -> Row:
    """Run one step of this batch, after two steps with two images."""
    if device.type != "cuda":
        inputs = inputs_of(network.name, batch)
        counted = measure(make(network.name, network.policy), inputs, optimizer=OPTIMIZER, loss=loss_of)
        return {"allocated_bytes": counted.peak_bytes, "reserved_bytes": None, "step_seconds": None, "note": ""}
    result: Row = {"allocated_bytes": None, "reserved_bytes": None, "step_seconds": None}

    def run() -> None:
        model = make(network.name, network.policy).to(device)
        optimizer = OPTIMIZER(model.parameters())
        for _ in range(2):  # allocates the optimizer's state and the workspaces of libraries
            training_step(model, inputs_of(network.name, 2).to(device), optimizer)
        x = torch.randn(batch, *inputs_of(network.name, 1).shape[1:], device=device)
        synchronize(device)
        start = time.perf_counter()
        peak = watch(lambda: training_step(model, x, optimizer), device)
        result["step_seconds"] = time.perf_counter() - start
        result.update(allocated_bytes=peak.allocated_bytes, reserved_bytes=peak.reserved_bytes)

    return result | {"note": attempt(run, device)}


def lines(rows_of_part: Sequence[Row]) -> list[str]:
    """Return the lines of the table."""
    columns = ("network", "pixels", "budget, MiB", "largest batch", "one step", "allocated, MiB", "reserved, MiB")
    return [
        f"The largest batch whose predicted peak is at most {100 * SHARE:.0f} % of the free memory, by",
        "`revnet.memory.max_batch_size`, and one training step of it with SGD and momentum in float32. It is the first",
        "step of its size, so its time includes the search for kernels.",
        "",
        *table((*columns, "step, s", "search, s"), [_cells(row) for row in rows_of_part]),
    ]


def _cells(row: Row) -> list[str]:
    return [
        row["network"],
        str(row["pixels"]),
        mib(row["budget_bytes"]),
        f"{row['batch']:,}",
        row["note"] or "fits",
        mib(row["allocated_bytes"]),
        mib(row["reserved_bytes"]),
        "" if row["step_seconds"] is None else f"{row['step_seconds']:.1f}",
        f"{row['search_seconds']:.1f}",
    ]


BATCHES = Part("batches", "The largest batches", 110, rows, lines)
