"""Costs of units, from the probes of a model."""

import itertools
import random

import pytest
import torch
from torch import nn

from revnet import ReversibleBlock, ReversibleSequential
from revnet.memory.planning._costs import count_costs, find_unit_spans, probes
from revnet.memory.planning._planner import POLICIES
from revnet.memory.planning._timing import RooflineTiming
from revnet.memory.planning._units import assign, find_units
from revnet.memory.step._predict import predicting
from revnet.models import RevNet


def test_probes_contain_every_pair_of_neighboring_choices():
    for num_choices in ([3, 3, 3, 2], [2], [2, 3, 1, 3], [4, 4], []):
        seen = {pair for probe in probes(num_choices) for pair in enumerate(itertools.pairwise(probe))}
        wanted = {
            (index, pair)
            for index, counts in enumerate(itertools.pairwise(num_choices))
            for pair in itertools.product(*map(range, counts))
        }
        assert seen == wanted
        for index, count in enumerate(num_choices):
            assert {probe[index] for probe in probes(num_choices)} == set(range(count))


@pytest.fixture
def prediction():
    model, x = RevNet(num_blocks=(2, 2), widths=(8, 8, 16)), torch.randn(4, 3, 8, 8)
    nothing = dict.fromkeys(("optimizer", "loss", "autocast", "dtype", "device"))
    with predicting(model, (x,), {}, **nothing) as prediction:
        yield model, prediction


@pytest.mark.parametrize("adds_variants", [False, True])
def test_the_chain_predicts_the_peak_of_any_mixture(prediction, adds_variants):
    model, prediction = prediction
    units = find_units(model, POLICIES, prediction.run().log)
    memory = prediction.memory()
    constant_bytes = memory.parameter_bytes + memory.buffer_bytes + memory.input_bytes
    units, costs, excess, _ = count_costs(
        model,
        units,
        prediction.run,
        RooflineTiming().seconds,
        constant_bytes=constant_bytes,
        floor=0,
        adds_variants=adds_variants,
    )
    assert excess < 0.05 * memory.peak_bytes
    draw = random.Random(0)
    for _ in range(5):
        choices = [draw.randrange(len(unit.choices)) for unit in units]
        assign(model, units, [unit.choices[choice] for unit, choice in zip(units, choices, strict=True)])
        peak = prediction.memory().peak_bytes
        assert costs.peak([0, *choices]) == pytest.approx(peak, rel=0.05)
    for choices in ([0] * len(units), [len(unit.choices) - 1 for unit in units]):
        assign(model, units, [unit.choices[choice] for unit, choice in zip(units, choices, strict=True)])
        log = prediction.run().log
        seconds = RooflineTiming().seconds(log.flops, log.moved_bytes).sum()
        assert costs.time([0, *choices]) == pytest.approx(seconds)


def test_equal_units_are_counted_once():
    blocks = [ReversibleBlock(nn.Linear(4, 4), nn.Tanh(), split_dim=-1) for _ in range(20)]
    model, x = nn.Sequential(nn.Linear(8, 8), ReversibleSequential(*blocks), nn.Linear(8, 2)), torch.randn(3, 8)
    nothing = dict.fromkeys(("optimizer", "loss", "autocast", "dtype", "device"))
    with predicting(model, (x,), {}, **nothing) as prediction:
        units = find_units(model, POLICIES, prediction.run().log)
        num_steps = []

        def count(kinds):
            steps = []
            costs = count_costs(
                model,
                units,
                lambda: steps.append(0) or prediction.run(),
                RooflineTiming().seconds,
                constant_bytes=0,
                floor=0,
                kinds=kinds,
            ).chain
            num_steps.append(len(steps))
            return costs

        of_equal, of_different = count(["block"] * len(units)), count(None)
    assert num_steps == [4, 12]
    for index in range(len(units) + 1):
        assert (of_equal.held[index] == of_different.held[index]).all()
        if 1 < index < len(units):  # less is known of the units at the ends
            assert (of_equal.transient[index] >= of_different.transient[index]).all()
        assert (of_equal.seconds[index] == of_different.seconds[index]).all()


def test_spans_follow_the_order_of_the_passes(prediction):
    model, prediction = prediction
    log = prediction.run().log
    units = find_units(model, POLICIES, log)
    spans = find_unit_spans(log, units)
    assert set(spans.of_event) == set(range(len(units) + 1)) - {0}  # the stem comes first
    forward = spans.of_event[: log.forward_end]
    assert (forward[1:] >= forward[:-1]).all()
    backward = spans.of_event[log.forward_end + 1 : -1]
    assert (backward[1:] <= backward[:-1]).all()
    held = sum(int(log.sizes[log.is_held & (spans.of_storage == span)].sum()) for span in range(len(units) + 1))
    assert held == log.held_bytes
