"""A tolerance with sharded parameters: each process would run other functions again, and gather their parameters."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from revnet import FixedPoint, ReversibleBlock, ReversibleSequential, Store, set_coupling, set_policy, set_tolerance
from revnet.distributed import shard_blocks
from tests.helpers import squares


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def residual():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def network(tolerance=None):
    torch.manual_seed(0)
    blocks = [ReversibleBlock(residual(), residual()) for _ in range(3)]
    return nn.Sequential(nn.Linear(5, 8), ReversibleSequential(*blocks, tolerance=tolerance))


@pytest.mark.parametrize("unit", ["block", "function"])
def test_shard_blocks_refuses_a_tolerance(unit):
    model = network(1e-3)
    with pytest.raises(ValueError, match=r"`1` has a `tolerance` \(=0.001\).*`set_tolerance\(model, None\)`.*DDP"):
        shard_blocks(model, unit=unit)
    set_tolerance(model, None)
    squares(shard_blocks(model, unit=unit)(torch.randn(2, 5))).backward()


SHARDED = {
    "block": lambda model: [fully_shard(block) for block in model[1]],
    "function": lambda model: [fully_shard(block.g) for block in model[1]],
    "layer": lambda model: fully_shard(model[1][1].f[0]),
    "blocks, gathered": lambda model: [fully_shard(block, reshard_after_forward=False) for block in model[1]],
    "shard_blocks": shard_blocks,
}


TIMES = ["before", "after a step", "afterwards"]
"""When a model with a tolerance is sharded."""


@pytest.mark.parametrize(
    ("kind", "when"),
    [(kind, when) for kind in SHARDED for when in TIMES if kind != "shard_blocks" or when == "afterwards"],
)
def test_a_run_refuses_sharded_parameters(kind, when):
    model, x = network(), torch.randn(2, 5)
    if when != "afterwards":
        set_tolerance(model, 1e-3)
    if when == "after a step":
        squares(model(x)).backward()
        model.zero_grad()
    SHARDED[kind](model)
    if when == "afterwards":
        squares(model(x)).backward()
        set_tolerance(model, 1e-3)
    for run in (model, model[1].record):
        with pytest.raises(
            NotImplementedError,
            match=r"a `tolerance` \(=0.001\) does not go with sharded parameters in `blocks\.\d\.[fg]`.*FixedPoint\(\)",
        ):
            run(x if run is model else torch.randn(2, 8))
    with torch.no_grad():
        assert torch.isfinite(model(x)).all()
    set_tolerance(model, None)
    squares(model(x)).backward()


@pytest.mark.parametrize(
    "change", [lambda model: set_coupling(model, FixedPoint()), lambda model: set_policy(model, Store())]
)
def test_runs_that_rebuild_exactly_or_not_at_all_go_on(change):
    model, x = network(1e-3), torch.randn(2, 5)
    change(model)
    SHARDED["block"](model)
    squares(model(x)).backward()


def test_a_sequence_that_is_gathered_as_a_whole_keeps_its_tolerance():
    model, x = network(1e-6).double(), torch.randn(2, 5).double()
    twin = copy.deepcopy(model)
    fully_shard(model)
    for module in (model, twin):
        squares(module(x)).backward()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad)


def test_a_run_refuses_synchronized_batch_norms(monkeypatch):
    model, x = network(1e-3), torch.randn(2, 5)
    model[1][1].f.append(nn.SyncBatchNorm(4))
    for is_alone in (True, False):
        if not is_alone:
            monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
            with pytest.raises(
                NotImplementedError, match=r"does not go with a synchronized batch norm in `blocks\.1\.f`"
            ):
                model(x)
        model.eval()
        squares(model(x)).backward()
        model.train()
