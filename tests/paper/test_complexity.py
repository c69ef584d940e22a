"""Exact growth of costs with depth, for a workload of one kilobyte."""

import csv
import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from revnet.bench.cases import Case
from revnet.memory import measure
from revnet.paper import run_complexity
from revnet.paper.complexity.costs import (
    QUICK_COMPLEXITY,
    TECHNIQUES,
    ComplexitySettings,
    growth_exponent,
    measure_complexity,
)

CASE = Case(
    "tiny", "tanh and linear", lambda: (_residual(), _residual()), (4, 8, 4), split_dim=2
)  # streams of 128 values, 512 bytes each
DEPTHS = (1, 4, 16)
STREAM = 512


def _residual():
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))


@pytest.fixture(scope="module")
def complexity():
    return measure_complexity(ComplexitySettings(case=CASE, memory_depths=DEPTHS, time_depths=()), lambda _: None)


@pytest.fixture
def costs(complexity):
    """Return bytes between the passes, peak bytes and ratios of FLOPs to naive, by depth."""
    naive = [cost.flops for cost in complexity.costs_of(TECHNIQUES[0])]

    def costs_of(method):
        (technique,) = (technique for technique in TECHNIQUES if technique.method == method)
        costs = complexity.costs_of(technique)
        assert [cost.depth for cost in costs] == list(DEPTHS)
        held = [cost.held_bytes for cost in costs]
        peak = [cost.peak_bytes for cost in costs]
        return held, peak, [cost.flops / reference for cost, reference in zip(costs, naive, strict=True)]

    return costs_of


def increments(values):
    return [after - before for before, after in pairwise(values)]


def test_naive_is_linear(costs):
    held, peak, flops = costs("plain")
    assert held == [
        4 * depth * STREAM + 4 for depth in DEPTHS
    ]  # the input and tanh's output of each function, and the loss
    assert increments(peak) == increments(held)
    assert flops == [1] * 3


def test_a_checkpoint_of_each_block_is_linear(costs):
    held, peak, flops = costs("checkpoint")
    assert held == [2 * depth * STREAM + 4 for depth in DEPTHS]  # one pair per block
    assert increments(peak)[1:] == increments(held)[1:]
    assert len(set(flops)) == 1


def test_checkpointing_grows_like_the_square_root(costs):
    held, peak, flops = costs("checkpoint sqrt")
    roots = [math.isqrt(depth) for depth in DEPTHS]
    assert held == [(2 * (root - 1) + 4 * root) * STREAM + 4 for root in roots]  # pairs; the last group is stored
    assert increments(peak)[1:] == increments(held)[1:]
    assert flops[-1] < 4 / 3


def test_recursive_checkpointing_grows_like_the_logarithm(costs):
    held, peak, flops = costs("checkpoint recursive")
    assert increments(held) == [2 * 2 * STREAM] * 2  # one pair for each of two halvings
    assert increments(peak)[1:] == [2 * 2 * STREAM]
    assert increments(flops) == pytest.approx([1 / 3] * 2, rel=0.2)  # half a forward pass for each


def test_reversible_is_constant(costs):
    held, peak, flops = costs("revnet")
    # One pair and the loss.
    assert held == [2 * STREAM + 4] * 3
    assert len(set(peak[1:])) == 1
    # Three passes, plus one forward pass without one product, the last of the first function.
    assert flops == pytest.approx([4 / 3 - 1 / (12 * depth) for depth in DEPTHS])


def test_bytes_from_shapes_equal_the_bytes_of_a_real_step(complexity):
    from revnet.bench import METHODS

    functions = CASE.functions(4, torch.device("cpu"))
    x = torch.cat(CASE.streams(1), CASE.split_dim).requires_grad_()
    for method in METHODS:
        for cost in complexity.costs:
            if (cost.method, cost.depth) == (method.name, 4):
                memory = measure(method.make(functions, CASE.split_dim), x)
                assert (memory.activation_bytes, memory.held_bytes) == (cost.peak_bytes, cost.held_bytes)


@pytest.mark.parametrize("power", [0, 0.5, 1, 2])
def test_growth_exponent_of_powers(power):
    assert growth_exponent([1, 4, 64], [3 * depth**power for depth in (1, 4, 64)]) == pytest.approx(power)


def test_does_not_change_the_random_state():
    state = torch.get_rng_state()
    measure_complexity(ComplexitySettings(case=CASE, memory_depths=(1, 2), time_depths=()), lambda _: None)
    assert torch.equal(torch.get_rng_state(), state)


def test_writes_all_files(tmp_path):
    settings = ComplexitySettings(case=CASE, memory_depths=(1, 4), time_depths=(2,), num_rounds=1)
    lines = []
    page = run_complexity(settings, tmp_path / "results", "revnet figure complexity --some-flag", say=lines.append)
    stem = page.name.removesuffix(".md")
    assert stem.startswith("complexity_cpu")
    assert {path.name for path in page.parent.iterdir()} == {f"{stem}{end}" for end in (".md", ".csv", ".png")}
    text = page.read_text()
    for part in (
        "- Hardware: ",
        "- Versions: PyTorch ",
        "- Date: ",
        "revnet figure complexity --some-flag`",
        "tanh and linear",
        "| | paper: activations | 1 block | 4 blocks | exponent | last two depths |",
        "| recursive checkpointing | O(L log L) | ",
        "| checkpoint of each block | not in the table | ",
        "| | 2 blocks |",
    ):
        assert part in text
    assert "2 blocks, revnet: step time " in "\n".join(lines)
    with page.with_suffix(".csv").open() as file:
        rows = {(row["method"], row["depth"], row["quantity"]): row["value"] for row in csv.DictReader(file)}
    assert rows["revnet", "1", "held after forward"] == rows["revnet", "4", "held after forward"]
    assert rows["plain", "2", "step / plain, median"] == "1.0"
    assert int(rows["plain", "4", "arithmetic"]) == 4 * int(rows["plain", "1", "arithmetic"])


def test_times_are_optional(tmp_path):
    settings = ComplexitySettings(case=CASE, memory_depths=(1, 2), time_depths=())
    page = run_complexity(settings, tmp_path, "some command", say=lambda _: None)
    assert "## Time" not in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_depths": (4,)}, r"`memory_depths` \(=\[4\]\) must have at least two entries, to show growth"),
        ({"memory_depths": ()}, "must have at least two"),
        (
            {"memory_depths": (0, 4)},
            r"`memory_depths` \(=\[0, 4\]\) must be positive and increasing, such as \[4, 16\]",
        ),
        ({"memory_depths": (16, 4)}, "must be positive and increasing"),
        ({"time_depths": (4, 4)}, r"`time_depths` \(=\[4, 4\]\) must be positive and increasing"),
        ({"num_rounds": 0}, r"`num_rounds` \(=0\) must be at least 1; 5 is usual"),
    ],
)
def test_rejects_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(QUICK_COMPLEXITY, **options)
