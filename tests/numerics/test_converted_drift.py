"""The drift of converted blocks is measured like the drift of reversible ones."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import revnet
from revnet import Checkpoint, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.conversion import BDIA, Adapter, Consistent, Dr2Net, Rewire, set_method
from revnet.engine import DriftMeter
from revnet.nn import set_coupling, set_tolerance
from revnet.numerics import drift_of, measure_drift
from tests.conversion.hosts import Block, Host, factors_of, twins
from tests.helpers import mlp
from tests.numerics.test_measure_drift import waves

FLOAT = [Dr2Net(0.3, 0.7), Consistent(-0.5, None), Rewire()]
BRANCHES = [["norm1", "mixer", "dropout"], "norm2 mlp"]
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))


class Shifting(nn.Module):
    """A residual block that adds `factor` times its input, and from the second call on a little more."""

    def __init__(self, factor, shift):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))
        self.shift = shift
        self.num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        return x + self.factor * x + (self.shift if self.num_calls > 1 else 0.0)


@pytest.mark.parametrize("method", FLOAT, ids=str)
def test_errors_are_relative_to_the_true_streams(method):
    factors, shift = [0.5, 3.0, -0.25, 0.75], 1e-3
    blocks = nn.Sequential(*[Shifting(factor, shift) for factor in factors])
    revnet.convert(blocks, method)
    drift = measure_drift(blocks, torch.ones(4, 3, dtype=torch.float64))
    a, b, c = factors_of(method)
    true = [1.0, 1.0]
    for factor in factors:
        true.append(a * true[-2] + c * true[-1] + b * factor * true[-1])
    # The backward pass subtracts too much at each block. Both streams after the last block are true.
    rebuilt = dict(enumerate(true[-2:], len(factors)))
    for index in reversed(range(len(factors))):
        source = rebuilt[index + 1]
        rebuilt[index] = (rebuilt[index + 2] - c * source - b * (factors[index] * source + shift)) / a
    errors = [abs(rebuilt[index] / value - 1) for index, value in enumerate(true)]
    # Block n has the streams n and n + 1. No function reads stream 0 again, and stream 4 was not rebuilt.
    pairs = [(errors[1],), errors[1:3], errors[2:4], (errors[3],)]
    expected = [math.hypot(*pair) / len(pair) ** 0.5 for pair in pairs]
    assert [block.error for block in drift.blocks] == pytest.approx(expected)
    growth = [error / following for error, following in pairwise(expected)]
    assert [block.amplification for block in drift.blocks] == [*map(pytest.approx, growth), None]
    assert [block.name for block in drift.blocks] == ["0", "1", "2", "3"]


def with_adapters(host):
    for block in host.blocks:
        block.adapter = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16))
    return host


@pytest.mark.parametrize(
    ("method", "branches", "readers"),
    [
        (Dr2Net(0.3, 0.7), None, ("norm1",)),
        (Rewire(), None, ("norm1",)),
        (Dr2Net(0.3, 0.7), BRANCHES, ("norm1", "norm2")),
        (Adapter(a=0.5, b=0.9, fraction_bits=None), None, ("norm1", "adapter")),
    ],
    ids=str,
)
def test_errors_equal_the_ones_of_two_runs(method, branches, readers):
    torch.manual_seed(0)
    host = with_adapters(Host(6))
    stored = copy.deepcopy(host)
    for model in (host, stored):
        revnet.convert(model, method, blocks="blocks", branches=branches)
    revnet.set_policy(stored, "store")
    host(X).sum().backward()  # The first pass compares the branches with the block.
    stored(X)

    def inputs_of(model):
        """Return the inputs of all residual functions by the number of the call."""
        seen = []
        for block in model.blocks:
            for reader in readers:
                seen.append([])
                block.get_submodule(reader).register_forward_pre_hook(
                    lambda _, args, calls=seen[-1]: calls.append(args[0].detach().clone())
                )
        return seen

    rebuilt, true = inputs_of(host), inputs_of(stored)
    drift = measure_drift(host, X)
    stored(X)
    errors = [float((b[1] - t[0]).norm() / t[0].norm()) for b, t in zip(rebuilt, true, strict=True)]
    assert 0 < max(errors) < 1e-3
    count, last = len(readers), len(errors) - 1
    for index, block in enumerate(drift.blocks):
        start = index * count
        # The stream that the first function of the block reads, unless it was held, and the one that the function
        # before has read. The adapter before has read another one.
        pair = [errors[start]] * (start < last)
        pair += [errors[start - 1]] * (index > 0 and not isinstance(method, Adapter))
        assert block.error == pytest.approx(math.hypot(*pair) / len(pair) ** 0.5, rel=1e-4)
        assert block.name == f"blocks.{index}"


@pytest.mark.parametrize("branches", [None, BRANCHES])
@pytest.mark.parametrize("method", [BDIA(), BDIA(0.5), Consistent(), Rewire(14), Adapter()], ids=str)
def test_exact_methods_have_no_drift(method, branches):
    if isinstance(method, Adapter):
        branches = None  # It takes whole blocks.
    model = with_adapters(Host(5))
    revnet.convert(model, method, blocks="blocks", branches=branches)
    drift = measure_drift(model, X, gradients=True)
    assert [(block.error, block.is_exact) for block in drift.blocks] == [(0.0, True)] * 5
    assert drift.gradient.relative_error == 0
    assert drift.verdict.startswith("Exact:")
    assert drift.advice == ()


def test_blocks_that_hold_their_inputs_are_kept():
    host, _ = twins(Dr2Net(1, 0))
    drift = measure_drift(host, X)
    assert [block.error for block in drift.blocks] == [None] * 5
    assert drift.verdict.startswith("Kept:")


def test_measuring_changes_nothing_and_compares_gradients():
    host, stored = twins(Dr2Net(0.3, 0.7))
    before = [parameter.clone() for parameter in host.parameters()]
    drift = measure_drift(host, X, loss=lambda y: y.square().sum(), gradients=True)
    assert [block.policy for block in drift.blocks] == [Reverse()] * 5
    assert [block._conversion_place.policy for block in host.blocks] == [Reverse()] * 5
    assert all(map(torch.equal, before, host.parameters()))
    gradients = [
        torch.autograd.grad(model(X).square().sum(), list(model.parameters()), allow_unused=True)
        for model in (host, stored)
    ]
    off, size = 0.0, 0.0
    for rebuilt, true in zip(*gradients, strict=True):
        off += float((rebuilt - true).double().square().sum())
        size += float(true.double().square().sum())
    assert drift.gradient.relative_error == pytest.approx((off / size) ** 0.5, rel=1e-3)
    assert all(block.gradient is not None for block in drift.blocks)


def test_checkpointed_and_stored_blocks_stop_the_error():
    host, _ = twins(Dr2Net(0.3, 0.7), num_blocks=7)
    for index, policy in {2: "checkpoint", 5: "store"}.items():
        revnet.set_policy(host.blocks[index], policy)
    drift = measure_drift(host, X)
    kept = [False, False, True, False, False, True, True]
    # The last block runs alone, and keeps the stream that its function reads.
    assert [block.error is None for block in drift.blocks] == kept
    assert [block.amplification is None for block in drift.blocks] == [False, True, True, False, True, True, True]
    assert [type(drift.blocks[index].policy) for index in (2, 5)] == [Checkpoint, Store]


class Staged(nn.Module):
    """A model with two lists of blocks, whose first blocks change the width."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([self.stage(4, 8), self.stage(8, 16)])

    @staticmethod
    def stage(old, new):
        return nn.ModuleList([nn.Linear(old, new), *[Block(new) for _ in range(3)]])

    def forward(self, x):
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return x


def test_names_are_the_ones_of_the_model():
    model = Staged()
    for stage in model.stages:
        revnet.convert(stage, Rewire())  # Both lists have the names 1, 2, 3.
    drift = measure_drift(model, X)
    assert [block.name for block in drift.blocks] == [f"stages.{stage}.{n}" for stage in (0, 1) for n in (1, 2, 3)]
    errors = [block.error for block in drift.blocks]
    assert None not in errors
    assert [block.amplification is None for block in drift.blocks] == [False, False, True] * 2
    assert [block.error for block in measure_drift(nn.Sequential(model), X).blocks] == errors
    assert measure_drift(nn.Sequential(model), X).blocks[0].name == "0.stages.0.1"


def test_a_list_in_another_order():
    model = Staged()
    blocks = list(model.stages[0][1:])
    revnet.convert([blocks[2], blocks[0], blocks[1]], Rewire())
    model.stages[0] = nn.ModuleList([model.stages[0][0], blocks[2], blocks[0], blocks[1]])
    drift = measure_drift(model, X)
    assert [block.name for block in drift.blocks] == [f"stages.0.{n}" for n in (1, 2, 3)]
    assert [block.amplification is None for block in drift.blocks] == [False, False, True]


class Mixed(nn.Module):
    """A model with converted blocks, and with reversible ones."""

    def __init__(self, depth=4):
        super().__init__()
        self.host = Host(depth)
        self.body = ReversibleSequential(*[ReversibleBlock(mlp(8), mlp(8)) for _ in range(depth)])

    def forward(self, x):
        y = self.host(x)
        return self.body(y.repeat(1, 6)[:, :16])


def test_a_model_with_both_kinds(tmp_path):
    model = Mixed()
    revnet.convert(model, Dr2Net(0.3, 0.7), blocks="host.blocks")
    drift = measure_drift(model, X, gradients=True)
    names = [f"{part}.blocks.{index}" for part in ("host", "body") for index in range(4)]
    assert [block.name for block in drift.blocks] == names
    assert all(0 < block.error < 1e-3 and block.gradient is not None for block in drift.blocks)
    alone = measure_drift(model.body, torch.randn(6, 16))
    assert [block.remedies is None for block in alone.blocks] == [True] * 4
    pytest.importorskip("matplotlib")
    drift.plot(tmp_path / "drift.png")


def test_advice_fits_the_blocks_that_drift():
    model = Mixed(depth=10)
    revnet.convert(model, Dr2Net(0.9, 0.1), blocks="host.blocks")
    drift = measure_drift(model, X)
    assert drift.verdict.startswith("Wrong: the input of `host.blocks.")
    exact, coefficients, policy = drift.advice
    assert "set_method(model, Dr2Net(alpha=0.9, beta=0.1, fraction_bits=14, is_wide=False))" in exact
    assert "undoing a function now divides errors by 0.1" in coefficients
    assert "set_policy(model, Checkpoint())" in policy
    assert "set_tolerance" not in drift.report()
    body, model.body = model.body, waves()
    advice = measure_drift(model, X).advice
    assert advice[0].startswith(
        "Converted blocks: reverse exactly, on a fixed-point grid: `revnet.conversion.set_method"
    )
    assert advice[2].startswith("Other blocks: bound the error: `revnet.nn.set_tolerance")
    model.body = body
    set_method(model, Dr2Net(0.9, 0.1, 14))
    assert measure_drift(model, X).worst.name.startswith("body.")  # Now the others have the largest error.
    set_method(model, Rewire())
    model.body = waves()
    advice = " ".join(measure_drift(model, X).advice)
    assert "set_tolerance" in advice
    assert "set_method" not in advice


def test_a_method_without_a_grid_gets_no_advice_about_it():
    host, _ = twins(Dr2Net(1, 1e-3), num_blocks=8)  # On a grid, `beta` would be 0.
    first, second = measure_drift(host, X).advice
    assert first.startswith("Move the coefficients toward 1")
    assert "Checkpoint()" in second


def test_several_passes_of_any_loop():
    host, _ = twins(Dr2Net(0.3, 0.7))
    meter = DriftMeter(is_quiet=True)
    with meter.on():
        loss = host(X).square().mean() + host(2 * X, stop=3).square().mean()
    loss.backward()
    set_method(host, Dr2Net(0.3, 0.7, 14))  # A schedule may move on before the records are read.
    drift = drift_of(host, meter.records)
    assert all(block.error > 0 for block in drift.blocks)
    compiled = torch.compile(host, backend="eager")
    assert [block.error for block in measure_drift(compiled, X).blocks] == [0.0] * 5
    torch._dynamo.reset()


def test_setters_name_the_way_for_converted_blocks():
    host, _ = twins(Dr2Net(0.3, 0.7))
    with pytest.raises(ValueError, match=r"has converted blocks, .*`revnet\.conversion\.set_method`") as caught:
        set_coupling(host, revnet.FixedPoint())
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"has converted blocks, .*`fraction_bits`"):
        set_tolerance(host, 1e-3)
    with pytest.raises(ValueError, match="build it from `ReversibleSequential`"):
        set_tolerance(nn.Linear(2, 2), 1e-3)
