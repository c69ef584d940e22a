"""Two processes on the CPU: gradients are the stored twin's, under DDP and under FSDP2."""

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from revnet import ReversibleSequential
from tests.helpers import CASE, assert_close, stored_twin

NUM_PROCESSES = 2
CONV = CASE["conv"]


def make_sequence(*, tied: bool = False) -> ReversibleSequential:
    torch.manual_seed(0)
    sequence = CONV.sequence(3)
    return ReversibleSequential(*sequence, sequence[0]) if tied else sequence


def process_input() -> torch.Tensor:
    """Another batch in each process."""
    torch.manual_seed(10 + dist.get_rank())
    return CONV.input(requires_grad=False)


def check_data_parallel(tied: bool, options: dict[str, bool]) -> None:
    sequence = make_sequence(tied=tied)
    twin = copy.deepcopy(sequence)
    twin.policies = stored_twin(sequence).policies
    x = process_input()
    for module in (sequence, twin):
        parallel = DistributedDataParallel(module, **options)
        for _ in range(2):
            parallel(x).square().sum().backward()
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert_close(parameter.grad, expected.grad)


def check_fully_sharded(per_function: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    sequence = make_sequence()
    twin = stored_twin(sequence)
    x = process_input()
    for module in (sequence, twin):
        if per_function:
            for block in module:
                fully_shard(block.f)
                fully_shard(block.g)
        fully_shard(module)
        module(x).square().sum().backward()
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert_close(parameter.grad.full_tensor(), expected.grad.full_tensor())


def run_process(rank: int, store: str, check, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=NUM_PROCESSES,
        timeout=datetime.timedelta(seconds=120),
    )
    try:
        check(*arguments)
    finally:
        dist.destroy_process_group()


def run_processes(tmp_path, check, *arguments) -> None:
    multiprocessing.spawn(run_process, args=(str(tmp_path / "store"), check, arguments), nprocs=NUM_PROCESSES)


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (False, {}),
        (False, {"find_unused_parameters": True}),
        (False, {"static_graph": True}),
        (True, {}),
    ],
    ids=["plain", "find-unused", "static-graph", "tied"],
)
def test_data_parallel(tmp_path, tied, options):
    run_processes(tmp_path, check_data_parallel, tied, options)


@pytest.mark.parametrize("per_function", [False, True], ids=["root", "per-function"])
def test_fully_sharded(tmp_path, per_function):
    run_processes(tmp_path, check_fully_sharded, per_function)
