"""Times of units, estimated and measured. No test depends on the speed of the machine."""

import numpy as np
import pytest
import torch
from torch import nn

from revnet import Checkpoint, ReversibleBlock, ReversibleSequential, Store, set_policy
from revnet.memory import MeasuredTiming, RooflineTiming, plan
from revnet.nn._whole_model import policy_holders


def make_model():
    blocks = [ReversibleBlock(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))) for _ in range(3)]
    return nn.Sequential(nn.Linear(8, 8), ReversibleSequential(*blocks))


def test_roofline_takes_the_longer_of_arithmetic_and_traffic():
    seconds = RooflineTiming(flops_per_byte=2).seconds(np.array([100, 300, 0]), np.array([100, 100, 7]))
    assert seconds * 100e9 == pytest.approx([100, 150, 7])


@pytest.mark.parametrize("flops_per_byte", [0, -1, float("inf"), float("nan"), "30"])
def test_rejects_a_ratio_that_is_not_positive(flops_per_byte):
    with pytest.raises(ValueError, match=r"`flops_per_byte` \(=.*\) must be above 0; 30 is usual"):
        RooflineTiming(flops_per_byte=flops_per_byte)


@pytest.mark.parametrize("num_rounds", [0, 1.5])
def test_rejects_a_number_of_rounds_that_is_not_positive(num_rounds):
    with pytest.raises(ValueError, match=r"`num_rounds` \(=.*\) must be a positive integer"):
        MeasuredTiming(num_rounds=num_rounds)


def test_measuring_does_not_change_the_model():
    model, x = make_model(), torch.randn(6, 8)
    set_policy(model, Checkpoint())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    planned = plan(model, x, budget="1GiB", timing=MeasuredTiming(num_rounds=2))
    assert planned.timing == MeasuredTiming(num_rounds=2)
    assert planned.peak_bytes <= 2**30
    assert [unit.name for unit in planned.units] == [f"1.blocks.{index}" for index in range(3)]
    assert all(unit.most_extra_time >= 0 for unit in planned.units)
    assert planned.references["plain autograd"].time_ratio == 1
    assert [holder.policies for holder in policy_holders(model).values()] == [(Checkpoint(),) * 3]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_no_policy_counts_as_faster_than_storing():
    """On a model this small, measured times are noise. A plan that may store everything must do so."""
    model, x = make_model(), torch.randn(6, 8)
    planned = plan(model, x, budget="1GiB", timing=MeasuredTiming(num_rounds=1))
    assert {unit.policy for unit in planned.units} == {Store()}
    assert planned.time_ratio == 1
    assert all(unit.most_extra_time > 0 for unit in planned.units)


def test_times_a_smaller_batch_if_memory_is_short(monkeypatch):
    model, x = make_model(), torch.randn(64, 8)
    seen = set()

    def note(module, inputs, output):
        if type(output) is torch.Tensor:  # not a fake one
            seen.add(len(output))

    model[0].register_forward_hook(note)
    whole = plan(model, x, budget="1GiB").references["plain autograd"].peak_bytes
    monkeypatch.setattr("revnet.memory.planning._unit_seconds.free_bytes", lambda device: whole * 5 // 8)
    plan(model, x, budget="1GiB", timing=MeasuredTiming(num_rounds=1))
    assert seen == {32}
    monkeypatch.setattr("revnet.memory.planning._unit_seconds.free_bytes", lambda device: 10)
    message = "not one of 64 samples fits four fifths of the 10 B that are free; use `RooflineTiming"
    with pytest.raises(ValueError, match=message):
        plan(model, x, budget="1GiB", timing=MeasuredTiming(num_rounds=1))


def test_times_frozen_units():
    model = make_model()
    model.requires_grad_(False)
    model[1][2].requires_grad_(True)
    planned = plan(model, torch.randn(6, 8), budget="1GiB", timing=MeasuredTiming(num_rounds=1))
    assert len(planned.units) == 3
