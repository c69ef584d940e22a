"""The tolerance of a sequence: a bound on the error of rebuilt streams, kept by keyframes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from revnet import (
    Checkpoint,
    FixedPoint,
    ReconstructionError,
    ReconstructionWarning,
    Reverse,
    ReversibleBlock,
    ReversibleSequential,
    Store,
    create_model,
    set_coupling,
    set_tolerance,
)
from revnet.coupling import Affine
from revnet.engine import DriftMeter
from revnet.memory import measure, predict
from revnet.nn import MomentumBlock
from tests.helpers import ConvResidual, gradients, mlp, squares, stored_twin

DEPTH = 16
WIDTH = 16


class Steep(nn.Module):
    """A function that multiplies small differences of its input by about `slope`, and counts its calls."""

    def __init__(self, slope=2.0):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.orthogonal_(self.linear.weight)
        self.slope = slope
        self.num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        return torch.sin(self.slope * self.linear(x))


class Nearby(nn.Module):
    """A function with the values of `function` and its gradients at a random point that is `distance` away."""

    def __init__(self, function, distance):
        super().__init__()
        self.function = function
        self.distance = distance

    def forward(self, x):
        offset = torch.randn_like(x)
        nearby = self.function(x + offset * (self.distance * x.detach().norm() / offset.norm()))
        return nearby + (self.function(x) - nearby).detach()


def steep_sequence(tolerance=1e-3, depth=DEPTH, slope=2.0, **options):
    blocks = [ReversibleBlock(Steep(slope), Steep(slope)) for _ in range(depth)]
    return ReversibleSequential(*blocks, tolerance=tolerance, **options)


def largest_error(sequence, step):
    """Return the largest error of the streams that functions read in the backward pass, over all elements."""
    meter = DriftMeter(is_quiet=True)
    with meter.on():
        step(sequence)
    return max((float(record.error) for record in meter.records), default=0.0)


def backward(sequence):
    generator = torch.Generator().manual_seed(1)
    squares(sequence(torch.randn(4, 2 * WIDTH, generator=generator))).backward()


def test_error_stays_below_the_bound_from_the_first_step():
    sequence = steep_sequence(slope=3.0)
    # In float64, inverting all blocks multiplies errors by more than 1e10. So in float32 rounding errors grow
    # to the size of the streams, whatever they were at first.
    unbounded = copy.deepcopy(sequence)
    unbounded.tolerance = None
    assert largest_error(unbounded, backward) > 100 * 0.5e-3
    for _ in range(3):
        assert 0 < largest_error(sequence, backward) <= 0.5e-3  # Keyframes are added above half of the tolerance.
        # Undoing one function multiplies errors by at most 1 + slope: a keyframe lasts for four functions or more.
        assert 0 < len(sequence.keyframes) <= DEPTH / 2


@pytest.mark.parametrize("tolerance", [1e-4, 1e-5])
def test_gradient_error_is_bounded_by_the_stream_error(tolerance):
    sequence = steep_sequence(tolerance, slope=3.0)
    twin, nearby = stored_twin(sequence), stored_twin(sequence)
    for block in nearby:
        block.f, block.g = Nearby(block.f, tolerance / 2), Nearby(block.g, tolerance / 2)
    all_gradients = []
    for module in (sequence, nearby, twin):
        backward(module)
        all_gradients.append(torch.cat([gradient.flatten() for gradient in gradients(module).values()]))
    error, measured = (all_gradients[0] - all_gradients[2]).norm(), (all_gradients[1] - all_gradients[2]).norm()
    # What errors of this size do to the gradients is measured in random directions. To first order, the worst direction
    # is at most sqrt(elements) times worse, and errors of all functions that add up sqrt(functions) times.
    assert 0 < error <= (4 * WIDTH * 2 * DEPTH) ** 0.5 * measured


def test_tighter_bound_needs_more_keyframes():
    counts = []
    for tolerance in (1e-1, 1e-4, 1e-6):
        torch.manual_seed(0)
        sequence = steep_sequence(tolerance)
        backward(sequence)
        counts.append(len(sequence.keyframes))
    assert counts[0] < counts[1] < counts[2]


def test_functions_run_twice_per_step_after_keyframes_are_set():
    sequence = steep_sequence()
    functions = [function for block in sequence for function in (block.f, block.g)]
    backward(sequence)
    first = sum(function.num_calls for function in functions)
    assert 4 * DEPTH < first <= 8 * DEPTH  # forward, back, and forward again in between
    keyframes = sequence.keyframes
    backward(sequence)
    assert sum(function.num_calls for function in functions) - first == 4 * DEPTH
    assert sequence.keyframes == keyframes


def test_keyframes_change_with_the_weights():
    sequence = steep_sequence()
    functions = [function for block in sequence for function in (block.f, block.g)]
    backward(sequence)
    few = len(sequence.keyframes)
    for function in functions:
        function.slope = 4.0
    assert largest_error(sequence, backward) <= 0.5e-3  # at once
    assert len(sequence.keyframes) > few
    for function in functions:
        function.slope = 0.5
    backward(sequence)
    assert len(sequence.keyframes) > few  # for now
    for _ in range(98):
        backward(sequence)
    assert sequence.keyframes == ()


@pytest.mark.parametrize("policy", [[Reverse()] * 7 + [Store()] + [Reverse()] * 8, [Checkpoint()] + [Reverse()] * 15])
def test_tolerance_works_with_mixed_policies(policy):
    sequence = steep_sequence(1e-5, policy=policy)
    for _ in range(2):
        assert largest_error(sequence, backward) <= 0.5e-5
    assert not {"blocks.7.f", "blocks.7.g"} & set(sequence.keyframes) or policy[7] == Reverse()
    assert len(sequence.keyframes) > 0


def test_retained_graph_runs_backward_twice():
    sequence = steep_sequence(1e-5)
    twin = stored_twin(sequence)
    for module in (sequence, twin):
        x = torch.randn(4, 2 * WIDTH, generator=torch.Generator().manual_seed(1))
        loss = squares(module(x))
        loss.backward(retain_graph=True)
        torch.autograd.grad(loss, module[3].f.linear.weight, retain_graph=True)
        loss.backward()
    for gradient, expected in zip(gradients(sequence).values(), gradients(twin).values(), strict=True):
        assert (gradient - expected).norm() <= 1e-2 * expected.norm()


def test_double_backward():
    sequence = steep_sequence(depth=6)
    twin = stored_twin(sequence)
    results = []
    for module in (sequence, twin):
        x = torch.randn(4, 2 * WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
        (grad,) = torch.autograd.grad(squares(module(x)), x, create_graph=True)
        (second,) = torch.autograd.grad(squares(grad), x)
        results.append(second)
    assert (results[0] - results[1]).norm() <= 1e-2 * results[1].norm()


def test_random_functions_and_statistics_equal_the_twin():
    blocks = [ReversibleBlock(nn.Sequential(ConvResidual(4), nn.Dropout(0.3)), ConvResidual(4)) for _ in range(DEPTH)]
    sequence = ReversibleSequential(*blocks, tolerance=1e-6)
    twin = stored_twin(sequence)
    x = torch.randn(4, 8, 6, 6)
    states = []
    for module in (sequence, twin):
        torch.manual_seed(2)
        module(x).square().mean().backward()
        states.append(torch.get_rng_state())
    assert len(sequence.keyframes) > 0
    assert torch.equal(*states)
    for buffer, expected in zip(sequence.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, expected)
    for gradient, expected in zip(gradients(sequence).values(), gradients(twin).values(), strict=True):
        assert (gradient - expected).norm() <= 1e-3 * expected.norm() + 1e-6


@pytest.mark.filterwarnings("ignore:undoing:revnet.ReconstructionWarning")
def test_stored_bytes():
    sequence = steep_sequence()
    x = torch.randn(64, 2 * WIDTH)
    stream, sample, loss = 64 * WIDTH * 4, 2048, 4
    for tolerance in (1e-3, 1e-7):
        sequence.tolerance = tolerance
        sequence(x).sum().backward()
        # The second of two neighbors stores one more stream. The first pair is always stored.
        places = [int(name.split(".")[1]) * 2 + name.endswith("g") for name in sequence.keyframes]
        streams = sum(1 if place - 1 in [0, *places] else 2 for place in places)
        expected = (2 + 2 + streams) * stream + 2 * DEPTH * sample + loss
        assert measure(sequence, x).held_bytes == expected
        assert predict(sequence, x).held_bytes == expected
    assert streams > len(places) > 2 * 4


def test_exact_couplings_need_no_keyframes():
    sequence = steep_sequence(None)
    set_coupling(sequence, FixedPoint())
    x = torch.randn(64, 2 * WIDTH)
    without = measure(sequence, x).held_bytes
    sequence.tolerance = 1e-6
    assert measure(sequence, x).held_bytes == without
    backward(sequence)
    assert sequence.keyframes == ()


def test_stream_is_stored_if_one_function_breaks_the_bound():
    sequence = steep_sequence(1e-8, depth=4)
    twin = stored_twin(sequence)
    with pytest.warns(
        ReconstructionWarning, match=r"undoing `blocks.\d.[fg]` alone has a relative error of \de-0\d, t"
    ) as warnings_raised:
        backward(sequence)
    backward(sequence)
    assert len(warnings_raised) == 1
    backward(twin)
    backward(twin)
    for gradient, expected in zip(gradients(sequence).values(), gradients(twin).values(), strict=True):
        assert (gradient - expected).norm() <= 1e-6 * expected.norm()
    assert len(sequence.keyframes) >= 2 * 4 - 3


def test_low_precision_keeps_the_bound():
    blocks = [ReversibleBlock(mlp(8), mlp(8), split_dim=-1) for _ in range(6)]
    sequence = ReversibleSequential(*blocks, tolerance=2e-2).bfloat16()
    twin = stored_twin(sequence)
    x = torch.randn(16, 16).bfloat16()
    meter = DriftMeter(is_quiet=True)
    with meter.on():
        sequence(x).float().square().mean().backward()
    twin(x).float().square().mean().backward()
    assert max(float(record.error) for record in meter.records) <= 1e-2
    assert len(sequence.keyframes) > 0


def test_nan_from_the_model_does_not_raise():
    sequence = steep_sequence(depth=4)
    x = torch.randn(4, 2 * WIDTH)
    x[0, 0] = torch.nan
    squares(sequence(x)).backward()
    assert sequence[0].f.linear.weight.grad.isnan().any()
    assert sequence.keyframes == ()


class Counting(Steep):
    """A function that returns something else in each call."""

    def forward(self, x):
        return super().forward(x) * (1 + 0.1 * self.num_calls)


def test_nondeterministic_function_gets_no_keyframes():
    blocks = [ReversibleBlock(Steep(), Steep()) for _ in range(4)]
    blocks[0].f = Counting()
    with pytest.raises(ReconstructionError, match=r"though it was computed as in the forward pass.*find_nondetermin"):
        backward(ReversibleSequential(*blocks, tolerance=1e-6))


def test_no_gradients_store_nothing():
    sequence = steep_sequence()
    with torch.no_grad():
        sequence(torch.randn(4, 2 * WIDTH))
    sequence.eval()
    backward(sequence)
    assert len(sequence.keyframes) > 0


def test_tolerance_is_shown_copied_and_set():
    sequence = steep_sequence()
    backward(sequence)
    number = len(sequence.keyframes)
    assert f"policy=Reverse(), tolerance=0.001, {number} keyframes" in repr(sequence)
    assert sequence.keyframes == tuple(sorted(sequence.keyframes, key=lambda name: (int(name.split(".")[1]), name)))
    assert copy.deepcopy(sequence).keyframes == pickle.loads(pickle.dumps(sequence)).keyframes == sequence.keyframes
    assert sequence[2:4].tolerance == 1e-3
    sequence.tolerance = None
    assert (sequence.tolerance, sequence.keyframes) == (None, ())
    model = create_model("revnet38")
    set_tolerance(model, 1e-4)
    assert [module.tolerance for module in model.modules() if isinstance(module, ReversibleSequential)] == [1e-4] * 3
    model(torch.randn(2, 3, 8, 8)).sum().backward()


@pytest.mark.parametrize("tolerance", [0, 1, -1e-3, float("nan"), True, "1e-3"])
def test_rejects_a_wrong_tolerance(tolerance):
    with pytest.raises(ValueError, match=r"`tolerance` \(=.*\) must be a relative error between 0 and 1"):
        steep_sequence(tolerance)


def test_set_tolerance_rejects_a_model_without_sequences():
    with pytest.raises(ValueError, match=r"`model` \(=Linear\) has no reversible sequence whose error"):
        set_tolerance(nn.Linear(2, 2), 1e-3)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own
def test_compiling_the_whole_sequence_raises():
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(3), mlp(3)) for _ in range(2)], tolerance=1e-3)
    with pytest.raises(Exception, match=r"a ReversibleSequential with a `tolerance` cannot be compiled as a whole"):
        torch.compile(sequence, fullgraph=True, backend="eager")(torch.randn(4, 6))


def halving():
    """Return a function for an affine coupling, with scales of about one half."""
    function = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8))
    with torch.no_grad():
        function[2].bias[4:] = -2.0  # The coupling takes the sigmoid of this plus two.
    return function


@pytest.mark.parametrize("kind", ["momentum", "affine"])
def test_works_with_every_coupling(kind):
    """The inverse of a momentum block doubles errors here, and so does the inverse of an affine block."""
    if kind == "momentum":
        blocks = [MomentumBlock(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), gamma=0.5) for _ in range(24)]
    else:
        blocks = [ReversibleBlock(halving(), halving(), coupling=Affine("sigmoid")) for _ in range(24)]
    sequence = ReversibleSequential(*blocks, tolerance=1e-4)
    twin = stored_twin(sequence)
    x = torch.randn(4, 8)
    meter = DriftMeter(is_quiet=True)
    with meter.on():
        loss = squares(sequence(x))
        loss.backward(retain_graph=True)
        loss.backward()
    assert max(float(record.error) for record in meter.records) <= 0.5e-4
    assert len(sequence.keyframes) > 0
    loss = squares(twin(x))
    loss.backward(retain_graph=True)
    loss.backward()
    for gradient, expected in zip(gradients(sequence).values(), gradients(twin).values(), strict=True):
        assert (gradient - expected).norm() <= 1e-2 * expected.norm()
