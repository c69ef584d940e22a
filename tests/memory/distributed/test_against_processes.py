"""Predictions for several devices equal the bytes of real processes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from revnet import Checkpoint, ReversibleBlock, ReversibleSequential, Store
from revnet.distributed import shard_blocks
from revnet.memory.distributed._device_memory import DeviceMemory
from revnet.memory.distributed._predict_distributed import predict_distributed
from revnet.memory.distributed._predict_process import passes_of
from revnet.memory.distributed._process_log import ProcessLog
from revnet.memory.distributed._process_step import run_process_step
from revnet.memory.distributed._summary import communication_of, device_memory
from revnet.models import ReversibleTransformer, RevNet
from tests.distributed.processes import run_in_processes

BATCH = 32
NUM_STEPS = 6
"""Steps of each process. A thread of gloo may keep a buffer alive a little longer, so only the least of all counts."""


def make_sequence(policy=None, num_blocks=4):
    def function():
        return nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 50), nn.GELU(), nn.Dropout(0.1), nn.Linear(50, 24))

    blocks = [ReversibleBlock(function(), function(), split_dim=-1) for _ in range(num_blocks)]
    options = {} if policy is None else {"policy": policy}
    return nn.Sequential(nn.Linear(10, 48), ReversibleSequential(*blocks, **options), nn.Linear(48, 5))


def make_transformer():
    return ReversibleTransformer(vocab_size=11, dim=16, depth=2, num_heads=2, max_length=16)


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    strategy: str = "fsdp2"
    optimizer: Any = torch.optim.AdamW
    autocast: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (10,)


IMAGE = (3, 8, 8)
make_revnet = partial(RevNet, num_blocks=(1, 1), widths=(4, 4, 8))
CASES = {
    "reverse": Case(make_sequence),
    "store": Case(partial(make_sequence, Store())),
    "checkpoint": Case(partial(make_sequence, Checkpoint())),
    "functions": Case(make_sequence, options={"shard_unit": "function"}),
    "functions, store": Case(partial(make_sequence, Store()), options={"shard_unit": "function"}),
    "kept whole": Case(make_sequence, options={"reshard_after_forward": False}),
    "autocast": Case(make_sequence, autocast=torch.bfloat16),
    "momentum": Case(make_sequence, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
    "no optimizer": Case(make_sequence, optimizer=None),
    "batch norm": Case(make_revnet, shape=IMAGE),
    "replicated": Case(make_sequence, "ddp"),
    "replicated, autocast": Case(make_sequence, "ddp", autocast=torch.bfloat16),
    "replicated, batch norm": Case(make_revnet, "ddp", shape=IMAGE),
    "replicated, several buckets": Case(
        lambda: nn.Sequential(nn.Linear(10, 600), nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 3)), "ddp"
    ),
    "tokens": Case(make_transformer, shape=(16,)),
    "replicated, tokens": Case(make_transformer, "ddp", shape=(16,)),
}

FEW = ["reverse", "functions", "batch norm", "replicated"]
"""The cases that are always tested."""


def batch_of(case, num_samples):
    if case.make is make_transformer:
        return torch.zeros(num_samples, *case.shape, dtype=torch.int64)
    return torch.zeros(num_samples, *case.shape)


def measure_case(case: Case, num_processes: int) -> list[tuple[Any, Any]]:
    """Return the memory and the communication of each step of this process."""
    torch.manual_seed(0)
    model = case.make()
    mesh = init_device_mesh("cpu", (num_processes,))
    with ProcessLog() as log:
        if case.strategy == "ddp":
            module: nn.Module = DistributedDataParallel(model)
        else:
            options = {"shard_unit": "block", "reshard_after_forward": True} | case.options
            shard_blocks(model, mesh=mesh, unit=options.pop("shard_unit"), **options)
            module = model
        optimizer = None if case.optimizer is None else case.optimizer(list(module.parameters()))
        x = batch_of(case, BATCH // num_processes)
        passes = passes_of(module, (x,), {}, loss=None, autocast=case.autocast)
        results = []
        for index in range(NUM_STEPS):
            step = run_process_step(log, module, [x], passes, optimizer=optimizer, num_warm_up=2 if index == 0 else 0)
            results.append((device_memory(step, "each device"), communication_of(step)))
    return results


def measure_cases(names: list[str]) -> dict[str, list[tuple[Any, Any]]]:
    return {name: measure_case(CASES[name], dist.get_world_size()) for name in names}


def measured_in(folder: Path, num_processes: int, names: list[str]) -> list[dict[str, Any]]:
    """Return the measured steps of each process, by case."""
    return run_in_processes(measure_cases, names, folder=folder, num_processes=num_processes)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return measured_in(tmp_path_factory.mktemp("two"), 2, FEW)


@pytest.fixture(scope="module")
def two_with_more_cases(tmp_path_factory):
    return measured_in(tmp_path_factory.mktemp("more"), 2, [name for name in CASES if name not in FEW])


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return measured_in(tmp_path_factory.mktemp("four"), 4, list(CASES))


def least_of(memories: list[DeviceMemory]) -> DeviceMemory:
    """Return the step with the lowest peak, with the fewest bytes between the passes of all steps."""
    return replace(
        min(memories, key=lambda memory: memory.peak_bytes),
        held_bytes=min(memory.held_bytes for memory in memories),
        communication_bytes=min(memory.communication_bytes for memory in memories),
    )


def assert_predicted(name: str, measured: list[dict[str, Any]]) -> None:
    case, num_processes = CASES[name], len(measured)
    for rank in range(num_processes):
        predicted = predict_distributed(
            case.make(),
            batch_of(case, BATCH),
            num_devices=num_processes,
            strategy=case.strategy,
            optimizer=case.optimizer,
            autocast=case.autocast,
            rank=rank,
            **case.options,
        )
        steps = measured[rank][name]
        assert least_of([memory for memory, _ in steps]) == predicted.devices[0]
        assert all(communication == predicted.communication for _, communication in steps)


@pytest.mark.parametrize("name", FEW)
def test_two_processes(name, two):
    assert_predicted(name, two)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in FEW])
def test_two_processes_with_more_cases(name, two_with_more_cases):
    assert_predicted(name, two_with_more_cases)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_four_processes(name, four):
    assert_predicted(name, four)
