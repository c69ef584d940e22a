"""What plans hold and keep under `Reverse`."""

import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from revnet import Checkpoint, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.engine import HalfBlock
from revnet.memory import MeasuredTiming, RooflineTiming, measure, plan, predict
from revnet.memory.planning._costs import count_costs
from revnet.memory.planning._plan_report import describe_policy
from revnet.memory.planning._planner import POLICIES
from revnet.memory.planning._search import ChainCosts, FrontierPoint
from revnet.memory.planning._tidy import tidied
from revnet.memory.planning._units import assign, find_units
from revnet.memory.planning._variants import (
    FEW_VARIANTS,
    MANY_UNITS,
    MOST_VARIANTS,
    Hold,
    Move,
    find_holds,
    find_variants,
)
from revnet.memory.step._predict import predicting
from tests.helpers import Attention


def conv(width=8):
    layers = [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False))


def perceptron(width):
    up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    return nn.Sequential(nn.LayerNorm(width), up, nn.GELU(), down)


def conv_model(num_blocks, width=8):
    blocks = [ReversibleBlock(conv(width), conv(width)) for _ in range(num_blocks)]
    return nn.Sequential(ReversibleSequential(*blocks))


def transformer(num_blocks, width=16):
    blocks = [ReversibleBlock(Attention(width), perceptron(width), split_dim=-1) for _ in range(num_blocks)]
    return nn.Sequential(ReversibleSequential(*blocks))


CASES = {
    "conv": (conv_model, lambda: torch.randn(4, 16, 8, 8)),
    "transformer": (transformer, lambda: torch.randn(4, 12, 32)),
}
all_cases = pytest.mark.parametrize(("make_model", "make_input"), CASES.values(), ids=CASES.keys())


@contextmanager
def counting(model, x, autocast=None):
    """Yield the units with their variants, the costs of the chain, and a function that returns a step's figures."""
    nothing = dict.fromkeys(("optimizer", "loss", "dtype", "device"))
    with predicting(model, (x,), {}, autocast=autocast, **nothing) as prediction:
        units = find_units(model, POLICIES, prediction.run().log)
        memory = prediction.memory()
        constant_bytes = memory.parameter_bytes + memory.buffer_bytes + memory.input_bytes
        options = {"constant_bytes": constant_bytes, "floor": 0, "adds_variants": True}
        units, costs, _, _ = count_costs(model, units, prediction.run, RooflineTiming().seconds, **options)

        def figures():
            log = prediction.run().log
            return prediction.memory().peak_bytes, RooflineTiming().seconds(log.flops, log.moved_bytes).sum()

        yield units, costs, figures


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@all_cases
def test_predictions_of_variants_equal_measurements(make_model, make_input, autocast):
    model, x = make_model(2), make_input()
    with counting(model, x, autocast) as (units, _, _):
        variants = units[0].variants
    assert len(variants) >= 4
    for policies in [*[[variant] * 2 for variant in variants[::2]], [variants[-1], variants[0]]]:
        model[0].set_policies(policies)
        assert predict(model, x, autocast=autocast).peak_bytes == measure(model, x, autocast=autocast).peak_bytes


@all_cases
def test_costs_of_mixtures_of_variants(make_model, make_input):
    model, x = make_model(4), make_input()
    with counting(model, x) as (units, costs, figures):
        assert units[1].variants == units[2].variants
        count = len(units[1].choices)
        for choices in ([0, 1, 2, 3], [2, 0, count - 1, 1], [3, 3, 0, 0], [1, count - 2, 2, count - 1]):
            assign(model, units, [unit.choices[choice] for unit, choice in zip(units, choices, strict=True)])
            peak, seconds = figures()
            assert costs.peak([0, *choices]) == pytest.approx(peak, rel=0.1)
            assert costs.time([0, *choices]) == pytest.approx(seconds, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_model", "width", "shape"),
    [
        pytest.param(conv_model, 32, (16, 64, 32, 32), id="conv"),
        pytest.param(transformer, 256, (4, 256, 512), id="transformer"),
    ],
)
def test_plans_are_faster_than_without_variants(make_model, width, shape):
    """Matrix products and convolutions must be large enough to cost more than the operations between them."""
    with torch.device("meta"):
        model, x = make_model(6, width), torch.empty(shape)
    whole, without = plan(model, x, budget="1GiB"), plan(model, x, budget="1GiB", policies=POLICIES)
    stored, least = whole.references["plain autograd"].peak_bytes, whole.points[0].peak_bytes
    times = [whole.points[0].time_ratio]
    for part in (1, 2, 3):
        budget = least + (stored - least) * part // 4
        fastest, fastest_without = (
            min(point.time_ratio for point in planned.points if point.peak_bytes <= budget)
            for planned in (whole, without)
        )
        assert fastest < fastest_without
        times.append(fastest)
    gains = [before - after for before, after in itertools.pairwise([*times, 1.0])]
    assert all(later < 1.1 * earlier for earlier, later in itertools.pairwise(gains)), "the curve is convex"
    assert len(whole.points) > 2 * len(without.points)
    planned = plan(model, x, budget=(least + stored) // 2)
    assert planned.peak_bytes <= planned.budget_bytes
    assert planned.time_ratio <= 1.01 * times[2]


def test_a_plan_with_variants_sets_them_and_reports_them():
    model, x = conv_model(4), torch.randn(4, 16, 8, 8)
    points = plan(model, x, budget="1GiB").points
    planned = plan(model, x, budget=points[len(points) // 3].peak_bytes)
    planned.apply(model)
    policies = [unit.policy for unit in planned.units]
    assert list(model[0].policies) == policies
    assert any(type(policy) is Reverse and policy != Reverse() for policy in policies)
    assert measure(model, x).peak_bytes == planned.peak_bytes
    for policy in policies:
        assert describe_policy(policy) in str(planned)
        names = {kind.__name__: kind for kind in (Reverse, Checkpoint, Store)}
        assert eval(describe_policy(policy), names) == eval(repr(policy), names) == policy


def test_given_policies_are_the_only_ones():
    model, x = conv_model(2), torch.randn(4, 16, 8, 8)
    given = [Reverse(hold="g", keep="f.convolution.0"), "store"]
    points = plan(model, x, budget="1GiB", policies=given).points
    for point in points:
        planned = plan(model, x, budget=point.peak_bytes, policies=given)
        assert {unit.policy for unit in planned.units} <= {given[0], Store()}
    names = list(plan(model, x, budget="1GiB", policies=given).references)
    assert names == ['Reverse(hold="g", keep="f.convolution.0") all', "plain autograd"]


def test_measured_times_of_variants():
    planned = plan(conv_model(2), torch.randn(4, 16, 8, 8), budget="1GiB", timing=MeasuredTiming(num_rounds=1))
    assert {unit.policy for unit in planned.units} == {Store()}
    assert all(point.time_ratio >= 1 for point in planned.points)


# Parts ----------------------------------------------------------------------------------------------------------------


def test_streams_that_a_block_may_hold():
    block = ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))
    f, g = find_holds(block.half_blocks())
    assert f == Hold("f", enters=True, leaves=False, updater="g")
    assert g == Hold("g", enters=False, leaves=True, updater="f")
    same = [HalfBlock(nn.Linear(2, 2), 0, 1), HalfBlock(nn.Linear(2, 2), 1, 0)]
    assert find_holds(same) == (), "one name would mean both streams"


def test_variants_add_the_move_that_saves_most_per_byte():
    moves = [
        Move(100, 2.0, hold="f", replaces="g.linear.1"),
        Move(10, 1.0, keep="f.linear.0"),
        Move(50, 1.9, keep="g.linear.1"),
        Move(10, 0.0, keep="g.linear.0"),
    ]
    assert find_variants(moves) == (
        Reverse(keep="f.linear"),
        Reverse(keep=("f.linear", "g.linear.1")),
        Reverse(hold="f", keep="f.linear"),
    )


def test_the_number_of_variants_is_limited():
    moves = [Move(10 + index, float(index < 40), keep=f"f.linear.{index}") for index in range(41)]
    for num_units, most in ((1, MOST_VARIANTS), (MANY_UNITS, FEW_VARIANTS)):
        variants = find_variants(moves, num_units)
        assert len(variants) == most
        assert len(variants[-1].keep) == 40


def test_equal_units_get_their_choices_in_a_row():
    held = [np.array([[0, 0], [8, 8]])] * 5 + [np.array([[0], [8]])]
    costs = ChainCosts(held, [[4, 9]] * 6, [[2.0, 1.0]] * 6, base=0, floor=0, fixed_seconds=0.0)
    choices = (0, 1, 0, 1, 0, 1)
    (point,) = tidied(costs, [FrontierPoint(costs.peak(choices), costs.time(choices), choices)])
    assert point == FrontierPoint(costs.peak(point.choices), costs.time(choices), (0, 0, 0, 1, 1, 1))
    assert point.peak_bytes <= costs.peak(choices)
