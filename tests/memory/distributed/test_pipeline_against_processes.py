"""Predictions for the stages of a pipeline equal the bytes of real processes."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from revnet import FixedPoint, ReversibleBlock, ReversibleSequential
from revnet.coupling import Additive
from revnet.distributed import Pipeline
from revnet.memory import predict_distributed
from revnet.memory.distributed._process_log import ProcessLog
from revnet.memory.distributed._process_step import run_process_step
from revnet.memory.distributed._summary import device_memory
from tests.distributed.processes import run_in_processes

WIDTH, SAMPLES = 24, 8


@dataclass(frozen=True)
class Case:
    policy: str = "reverse"
    is_exact: bool = False
    num_blocks: int = 5
    num_microbatches: int = 4
    has_ends: bool = True
    optimizer: Any = None
    autocast: torch.dtype | None = None


CASES = {
    "reverse": Case(),
    "store": Case("store"),
    "more microbatches": Case(num_microbatches=8),
    "optimizer": Case(optimizer=torch.optim.AdamW),
    "checkpoint": Case("checkpoint"),
    "exact": Case(is_exact=True),
    "blocks alone": Case(has_ends=False),
    "autocast": Case(autocast=torch.bfloat16),
}
FEW = ["reverse", "store", "more microbatches", "optimizer"]
"""The cases that are always tested."""


def parts_of(case: Case) -> tuple[nn.Module | None, ReversibleSequential, nn.Module | None]:
    def function() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 50), nn.GELU(), nn.Linear(50, WIDTH))

    torch.manual_seed(0)
    coupling = FixedPoint() if case.is_exact else Additive()
    blocks = [ReversibleBlock(function(), function(), split_dim=-1, coupling=coupling) for _ in range(case.num_blocks)]
    sequence = ReversibleSequential(*blocks, policy=case.policy)
    if not case.has_ends:
        return None, sequence, None
    return nn.Linear(10, 2 * WIDTH), sequence, nn.Linear(2 * WIDTH, 5)


def batch_of(case: Case) -> torch.Tensor:
    return torch.zeros(SAMPLES * case.num_microbatches, 10 if case.has_ends else 2 * WIDTH)


def measure_case(case: Case, rank: int, num_stages: int) -> list[Any]:
    """Return the memory of this stage in each step, and the bytes that it sends."""
    stem, blocks, head = parts_of(case)
    num_ahead = num_stages - 1 - rank
    with ProcessLog() as log:
        x = batch_of(case) if rank == 0 else None
        pipeline = Pipeline(blocks, num_microbatches=case.num_microbatches, stem=stem, head=head)
        optimizer = None if case.optimizer is None else case.optimizer(pipeline.parameters())
        runner = pipeline._runner
        plain = {name: getattr(runner, name) for name in ("forward", "backward", "backward_from_loss")}

        def passes(between: Any) -> None:
            count = 0

            def marked(run: Any, *arguments: Any) -> Any:
                nonlocal count
                if count >= num_ahead:
                    between()
                count += 1
                return run(*arguments)

            for name, run in plain.items():
                setattr(runner, name, partial(marked, run))
            with torch.autocast("cpu", case.autocast, enabled=case.autocast is not None):
                pipeline.step(x, None, lambda output, _: output.sum())

        steps = [
            run_process_step(
                log, pipeline, [] if x is None else [x], passes, optimizer=optimizer, num_warm_up=int(index == 0)
            )
            for index in range(4)
        ]
        memories = [device_memory(step, f"stage {rank}") for step in steps]
    return [min(memories, key=lambda memory: memory.peak_bytes), pipeline.traffic]


def measure_cases(names: list[str]) -> dict[str, list[Any]]:
    return {name: measure_case(CASES[name], dist.get_rank(), dist.get_world_size()) for name in names}


def measured_in(folder: Path, num_stages: int, names: list[str]) -> list[dict[str, Any]]:
    """Return the measurements of each stage, by case."""
    return run_in_processes(measure_cases, names, folder=folder, num_processes=num_stages)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return measured_in(tmp_path_factory.mktemp("two"), 2, FEW)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return measured_in(tmp_path_factory.mktemp("four"), 4, list(CASES))


def assert_predicted(name: str, measured: list[dict[str, Any]]) -> None:
    case = CASES[name]
    stem, blocks, head = parts_of(case)
    predicted = predict_distributed(
        nn.Sequential(*[part for part in (stem, blocks, head) if part is not None]),
        batch_of(case),
        num_devices=len(measured),
        strategy="pipeline",
        num_microbatches=case.num_microbatches,
        optimizer=case.optimizer,
        autocast=case.autocast,
    )
    for stage, results in zip(predicted.devices, measured, strict=True):
        assert results[name][0] == stage
    forward, backward = predicted.communication
    assert measured[0][name][1].forward_bytes == forward.num_bytes
    assert measured[-1][name][1].backward_bytes == backward.num_bytes


@pytest.mark.parametrize("name", FEW)
def test_two_stages(name, two):
    assert_predicted(name, two)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_four_stages(name, four):
    assert_predicted(name, four)
