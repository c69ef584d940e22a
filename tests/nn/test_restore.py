import math

import pytest
import torch
from torch import nn

from revnet import (
    Checkpoint,
    Offload,
    PolicySequential,
    Reverse,
    ReversibleBlock,
    ReversibleSequential,
    Store,
    set_policy,
)
from revnet.memory import measure
from revnet.nn._restore import restoring_policies
from revnet.nn._whole_model import policy_holders
from revnet.numerics import find_nondeterministic, measure_drift


def fail_with_other_policies(model):
    with restoring_policies(model):
        set_policy(model, Offload())
        raise ZeroDivisionError


def test_policies_are_restored_after_an_error():
    model = nn.Sequential(PolicySequential(nn.Linear(3, 4)), nn.Linear(4, 2))
    with pytest.raises(ZeroDivisionError):
        fail_with_other_policies(model)
    assert [holder.policies for holder in policy_holders(model).values()] == [(Store(),)]


class WithBuffers(nn.Module):
    """A function that reads one buffer, changes another, and has a third one with NaN and -0."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("scale", torch.full((2,), 0.5))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("odd", torch.tensor([math.nan, -0.0]))

    def forward(self, x):
        self.count += 1
        return self.linear(x) * self.scale


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint(), Store()], ids=str)
def test_a_graph_that_waits_for_its_backward_pass_remains_valid(policy):
    """Buffers that a measurement does not change are not written to."""
    torch.manual_seed(0)
    blocks = [ReversibleBlock(WithBuffers(), WithBuffers()) for _ in range(2)]
    model, x = ReversibleSequential(*blocks, policy=policy), torch.randn(3, 4)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    counts = [block.f.count.item() for block in blocks]
    loss = model(x).square().sum()
    for run in (measure, measure_drift, find_nondeterministic):
        run(model, x)
    assert [block.f.count.item() for block in blocks] == [count + 1 for count in counts]
    actual = torch.autograd.grad(loss, list(model.parameters()))
    assert all(map(torch.equal, actual, expected))
    assert blocks[0].f.odd.signbit().tolist()[1]
