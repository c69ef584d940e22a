"""Measured drift equals the true drift, and measuring does not change the model."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from revnet import Checkpoint, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.coupling import FixedPoint
from revnet.nn import set_policy
from revnet.numerics import measure_drift
from revnet.numerics._block_drift import GradientDrift
from revnet.numerics._gradients import angle_and_error
from tests.helpers import all_cases, all_reversible_models, assert_same_buffers, mlp, model_input, squares


class Shifting(nn.Module):
    """Returns `factor` times its input, and `shift` more from the second call on, so that reconstruction errs."""

    def __init__(self, factor: float, shift: float = 0.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))
        self.shift = shift
        self.num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        return self.factor * x + (self.shift if self.num_calls > 1 else 0.0)


def perceptrons(depth=6, scale=1.0, policy=None):
    model = ReversibleSequential(*[ReversibleBlock(mlp(8), mlp(8)) for _ in range(depth)], policy=policy or Reverse())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


class Wave(nn.Module):
    """Amplifies small differences; undoing a block with two of them multiplies errors by about four."""

    def __init__(self):
        super().__init__()
        self.linear = nn.init.orthogonal_(nn.Parameter(torch.empty(8, 8)))

    def forward(self, x):
        return torch.sin(3 * x @ self.linear)


def waves():
    """Return a model that amplifies float32 rounding errors to the size of the streams."""
    return ReversibleSequential(*[ReversibleBlock(Wave(), Wave()) for _ in range(20)])


def test_errors_are_relative_to_the_true_streams():
    shift = 0.25
    blocks = [
        ReversibleBlock(Shifting(0.5), Shifting(0.5)),
        ReversibleBlock(Shifting(3.0), Shifting(0.5)),
        ReversibleBlock(Shifting(0.5), Shifting(0.5, shift)),
    ]
    x1, x2 = torch.ones(4, 3, dtype=torch.float64), 2 * torch.ones(4, 3, dtype=torch.float64)
    drift = measure_drift(ReversibleSequential(*blocks), (x1, x2))
    streams = [(1.0, 2.0)]
    for first, second in ((0.5, 0.5), (3.0, 0.5), (0.5, 0.5)):
        y1 = streams[-1][0] + first * streams[-1][1]
        streams.append((y1, streams[-1][1] + second * y1))
    # The last g subtracts 0.25 too much, so x2 of the last block is too small by that, and x1 too large by half of it.
    off1, off2 = 0.5 * shift, -shift
    third = math.hypot(off1 / streams[2][0], off2 / streams[2][1]) / math.sqrt(2)
    off2 = off2 - 0.5 * off1
    off1 = off1 - 3.0 * off2
    second = math.hypot(off1 / streams[1][0], off2 / streams[1][1]) / math.sqrt(2)
    first = abs(off2 - 0.5 * off1) / streams[0][1]  # no function reads x1 of the first block again
    assert [block.error for block in drift.blocks] == pytest.approx([first, second, third])
    assert [block.amplification for block in drift.blocks] == [
        pytest.approx(first / second),
        pytest.approx(second / third),
        None,
    ]
    assert drift.amplification == pytest.approx(math.sqrt(first / third))
    assert drift.error == pytest.approx(max(first, second, third))
    assert [block.name for block in drift.blocks] == ["blocks.0", "blocks.1", "blocks.2"]


@all_reversible_models
def test_does_not_change_the_model(make_model):
    model = make_model().double()
    x = model_input(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    twin, state = copy.deepcopy(model), torch.get_rng_state()
    drift = measure_drift(model, x, gradients=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_buffers(model, twin)
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
    policies = [block.policy for block in measure_drift(model, x).blocks]
    assert policies == [block.policy for block in drift.blocks]
    assert Store() not in policies
    assert any(block.error is not None for block in drift.blocks)
    assert drift.error < 1e-9  # the rounding of float64 in a few blocks
    assert drift.gradient.relative_error < 1e-9
    assert drift.dtype == torch.float64


@all_cases
def test_measures_every_block(case):
    model, x = case.sequence(4), case.input()
    args, kwargs = case.args(), case.kwargs()
    torch.manual_seed(3)
    drift = measure_drift(model, x, *args, kwargs=kwargs, loss=squares, gradients=True)
    torch.manual_seed(3)
    loss = squares(model(x, *args, **kwargs))
    rebuilt = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    set_policy(model, Store())
    assert x.grad is None
    assert drift.error < 1e-9  # float64, dropout and noise as in the first pass
    assert drift.gradient.relative_error < 1e-9
    assert all(gradient.isfinite().all() for gradient in rebuilt)


def test_gradients_are_compared_with_the_stored_twin():
    model, x = perceptrons(scale=6.0), torch.randn(16, 16)
    drift = measure_drift(model, x, loss=squares, gradients=True)
    rebuilt = dict(zip(*_named_gradients(model, x), strict=True))
    set_policy(model, Store())
    stored = dict(zip(*_named_gradients(model, x), strict=True))
    angle, error = angle_and_error(list(rebuilt.values()), list(stored.values()))
    assert (drift.gradient.angle_degrees, drift.gradient.relative_error) == (angle, error)
    names = [name for name in stored if name.startswith("blocks.2.")]
    angle, error = angle_and_error([rebuilt[name] for name in names], [stored[name] for name in names])
    assert (drift.blocks[2].gradient.angle_degrees, drift.blocks[2].gradient.relative_error) == (angle, error)
    assert error > 0


def _named_gradients(model, x):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return names, torch.autograd.grad(squares(model(x)), parameters)


def test_kept_streams_stop_the_error():
    policies = [Reverse(), Reverse(), Checkpoint(), Reverse(), Reverse(), Store()]
    drift = measure_drift(perceptrons(policy=policies), torch.randn(4, 16))
    assert [block.error is None for block in drift.blocks] == [False, False, True, False, False, True]
    assert [block.amplification is None for block in drift.blocks] == [False, True, True, False, True, True]
    assert [block.policy for block in drift.blocks] == policies


def test_exact_couplings_have_no_error():
    model = perceptrons(scale=4.0)
    for block in model:
        block.coupling = FixedPoint()
    drift = measure_drift(model, torch.randn(4, 16), gradients=True)
    assert [block.error for block in drift.blocks] == [0.0] * 6
    assert (drift.gradient.relative_error, drift.gradient.angle_degrees) == (0, 0)
    assert drift.amplification is None
    assert drift.verdict.startswith("Exact:")
    assert drift.advice == ()


def test_exact_couplings_with_nondeterministic_functions():
    blocks = [ReversibleBlock(mlp(3), mlp(3)).double() for _ in range(2)]
    blocks[1].g = Shifting(0.5, 0.25)
    for block in blocks:
        block.coupling = FixedPoint()
    drift = measure_drift(ReversibleSequential(*blocks), torch.randn(4, 6, dtype=torch.float64))
    assert drift.error > 0
    (advice,) = drift.advice
    assert "find_nondeterministic" in advice


def test_nan_is_reported_not_raised():
    blocks = [ReversibleBlock(mlp(3), mlp(3)).double() for _ in range(3)]
    blocks[2].g = Shifting(0.5, math.inf)
    drift = measure_drift(ReversibleSequential(*blocks), torch.randn(4, 6, dtype=torch.float64))
    assert not math.isfinite(drift.error)
    assert drift.worst.name == "blocks.2"
    assert drift.verdict.startswith("Broken: the input of `blocks.2` is rebuilt with NaN or inf")
    assert len(drift.advice) >= 3


def test_large_drift_gives_advice_and_no_warning(recwarn):
    drift = measure_drift(waves(), torch.randn(16, 16))
    assert len(recwarn) == 0
    assert drift.error > 1e-2
    assert drift.verdict.startswith("Wrong: the input of `blocks.")
    text = " ".join(drift.advice)
    for hint in ("set_tolerance", "FixedPoint()", "Checkpoint()", "conditioning_penalty"):
        assert hint in text
    assert "float32" not in text


def test_advises_against_low_precision_streams():
    drift = measure_drift(perceptrons(depth=24).bfloat16(), torch.randn(16, 16).bfloat16())
    assert drift.dtype == torch.bfloat16
    assert drift.advice[0].startswith("Keep the streams in float32; they are bfloat16 now")


def test_autocast_keeps_the_streams_in_float32():
    model = nn.Sequential(nn.Linear(16, 16), perceptrons(depth=24))
    drift = measure_drift(model, torch.randn(16, 16), autocast=torch.bfloat16)
    assert drift.dtype == torch.float32
    assert drift.error < 0.1  # A rounding to bfloat16 that tips over is 2^-8 of what a function returns.
    assert drift.blocks[3].name == "1.blocks.3"


def test_a_block_outside_a_sequence():
    block, x = ReversibleBlock(mlp(3), mlp(3)), torch.randn(4, 6)
    drift = measure_drift(nn.Sequential(nn.Linear(6, 6), block), x)
    assert [block.name for block in drift.blocks] == ["1"]
    assert drift.blocks[0].error < 1e-5
    with pytest.raises(ValueError, match=r"the block `1` is outside a ReversibleSequential, where it cannot be sto"):
        measure_drift(nn.Sequential(nn.Linear(6, 6), block), x, gradients=True)


def test_frozen_parts_are_not_rebuilt():
    model = perceptrons(depth=4)
    for index in (0, 1):
        model[index].requires_grad_(False)
    drift = measure_drift(model, torch.randn(4, 16), gradients=True)
    assert [block.error is None for block in drift.blocks] == [True, True, False, False]
    assert [block.gradient is None for block in drift.blocks] == [True, True, False, False]


def test_blocks_of_a_stage_are_found_under_their_numbers_in_the_whole_network():
    stage, x = perceptrons(depth=4), torch.randn(4, 16)
    errors = [block.error for block in measure_drift(stage, x).blocks]
    stage.first_block = 5  # As in the second stage of a pipeline.
    assert [block.error for block in measure_drift(stage, x).blocks] == errors
    assert None not in errors


def test_a_compiled_model_has_the_same_drift():
    model, x = perceptrons(), torch.randn(4, 16)
    assert measure_drift(torch.compile(model, backend="eager"), x) == measure_drift(model, x)


def test_measures_under_a_tolerance_without_changing_its_state(tmp_path):
    model, x = waves(), torch.randn(16, 16)
    unbounded = measure_drift(model, x)
    model.tolerance = 1e-3
    before = model.tolerance_state()
    drift = measure_drift(model, x, gradients=True)
    assert model.tolerance_state() == before
    assert model.keyframes == ()
    assert drift.error <= 1e-3 < unbounded.error
    assert (drift.tolerance, unbounded.tolerance, unbounded.keyframes) == (1e-3, None, ())
    assert len(drift.keyframes) > 0
    assert f"\n{len(drift.keyframes)} keyframe" in drift.report()
    # A pair that the tolerance replaced by the true one has no amplification.
    assert all(factor > 0.1 for _, factor in drift.amplifications())
    pytest.importorskip("matplotlib")
    drift.plot(tmp_path / "guarded.png")


def test_advises_a_tighter_tolerance_if_gradients_are_worse():
    drift = measure_drift(perceptrons(), torch.randn(4, 16))
    assert drift.verdict.startswith("Sound:")
    worse = replace(drift, gradient=GradientDrift(0.2, 11.0), tolerance=1e-3)
    assert worse.verdict.startswith("Wrong:")
    assert "The gradient of the model is off by 0.2, an angle of 11 degrees." in worse.verdict
    assert worse.advice[0].startswith("Tighten the tolerance of 0.001, ")


def test_the_report_thins_out_many_blocks():
    drift = measure_drift(perceptrons(depth=50), torch.randn(4, 16))
    lines = drift.report().splitlines()
    assert "(40 of 50 blocks are shown)" in lines
    assert sum(line.startswith("blocks.") for line in lines) == 40
    assert str(drift) == drift.report()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: measure_drift(nn.Linear(16, 16), x), ValueError, "has no reversible block"),
        (lambda x: measure_drift(perceptrons().requires_grad_(False), x), ValueError, "no parameter that requires"),
        (lambda x: measure_drift("revnet38", x), TypeError, r"`model` \(=str\) must be a module"),
        (lambda x: measure_drift(perceptrons(), x, kwargs=3), TypeError, r"`kwargs` \(=int\) must be a dict"),
        (lambda x: measure_drift(perceptrons(), x, loss=3), TypeError, r"`loss` \(=3\) must be a function"),
        (lambda x: measure_drift(perceptrons(), x, autocast="bf16"), TypeError, r"`autocast` \(='bf16'\) must be"),
        (lambda x: measure_drift(perceptrons(), x, loss=lambda y: y), TypeError, r"`loss` returned .* a scalar"),
        (
            lambda x: measure_drift(perceptrons(), x, loss=lambda y: y.sum() * 1j),
            TypeError,
            "`loss` returned .*complex64",
        ),
        (lambda x: measure_drift(perceptrons(), x, loss=lambda y: 0.5), TypeError, r"`loss` returned float"),
        (lambda x: measure_drift(perceptrons(), x, loss=lambda y: y.detach().sum()), ValueError, "requires no gradi"),
    ],
)
def test_rejects_wrong_arguments_in_one_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call(torch.randn(4, 16))
    assert "\n" not in str(caught.value)
