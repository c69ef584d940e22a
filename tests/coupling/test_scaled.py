import copy
import math

import pytest
import torch
from torch import nn

from revnet import Checkpoint, Offload, Reverse, ReversibleBlock, ReversibleSequential, Store, set_coupling, set_policy
from revnet.coupling import Scaled
from revnet.nn import LeapfrogBlock, MomentumBlock
from tests.helpers import assert_close, mlp, squares

SCHEMES = {
    "euler": Scaled.euler(0.5),
    "midpoint": Scaled.midpoint(0.5),
    "rewired": Scaled.rewired(),
    "leapfrog": Scaled.leapfrog(0.5),
    "momentum": Scaled.momentum(0.9),
    "equilibrium": Scaled.equilibrium(0.3),
    "dual": Scaled.dual(0.2, 0.8),
    "consistent": Scaled.consistent(-0.8),
    "meft": Scaled(0.8),
}
all_schemes = pytest.mark.parametrize("coupling", SCHEMES.values(), ids=SCHEMES)


def stack(coupling, depth=3, dim=3):
    return ReversibleSequential(*[ReversibleBlock(mlp(dim), mlp(dim), coupling=coupling) for _ in range(depth)])


def gradients(sequence, x):
    return torch.autograd.grad(squares(sequence(x)), [x, *sequence.parameters()])


def functions_of(sequence):
    return [function for block in sequence for function in (block.f, block.g)]


@all_schemes
def test_computes_the_two_step_scheme(coupling):
    sequence = stack(coupling).double()
    before, x = torch.randn(2, 4, 3, dtype=torch.float64)
    y = sequence((before, x))
    for function in functions_of(sequence):
        before, x = x, coupling.a * before + coupling.c * x + coupling.b * function(x)
    assert_close(y, (before, x), tolerance=1e-13)


@all_schemes
@pytest.mark.parametrize("policy", [Reverse(), Reverse(hold="f"), Checkpoint(), Offload()], ids=str)
def test_gradients_and_inverse_in_double_precision(coupling, policy):
    sequence, x = stack(coupling).double(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    twin = copy.deepcopy(sequence)
    set_policy(twin, Store())
    set_policy(sequence, policy)
    assert_close(gradients(sequence, x), gradients(twin, x), tolerance=1e-12)
    assert_close(sequence.inverse(sequence(x)), x, tolerance=1e-12)


def test_leapfrog_and_momentum_blocks_compute_the_schemes():
    x = torch.randn(4, 3, dtype=torch.float64)
    for make, coupling in (
        (lambda f: LeapfrogBlock(f, step_size=0.5), Scaled.leapfrog(0.5)),
        (lambda f: MomentumBlock(f, gamma=0.9), Scaled.momentum(0.9)),
    ):
        sequence = stack(coupling).double()
        functions = functions_of(sequence)
        y, _ = ReversibleSequential(*[make(function) for function in functions])((x, torch.zeros_like(x)))
        _, expected = sequence((x, x))  # `x[-1] = x[0]` is a velocity of zero.
        assert_close(y, expected, tolerance=1e-12)


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


@pytest.mark.parametrize("a", [0.5, 0.7, -0.6])
def test_errors_grow_by_the_law(a):
    coupling = Scaled.consistent(a)
    assert coupling.growth == pytest.approx(1 / abs(a))

    def error(num_functions):
        blocks = [ReversibleBlock(Zero(), Zero(), coupling=coupling) for _ in range(num_functions // 2)]
        sequence, x = ReversibleSequential(*blocks), torch.randn(1000, 2)
        return float((sequence.inverse(sequence(x)) - x).norm())

    few, many = error(8), error(24)
    assert few * coupling.growth**16 / 30 < many < few * coupling.growth**16 * 30


@pytest.mark.parametrize(
    ("coupling", "growth"),
    [
        (Scaled.midpoint(), 1.0),
        (Scaled.leapfrog(), 1.0),
        (Scaled.momentum(0.8), 1 / 0.8),
        (Scaled.equilibrium(0.75), 2.0),
        (Scaled.dual(0.3, 0.7), 1 / 0.7),
        (Scaled(0.25, 1, 0), 2.0),
        (Scaled(1, 1, 1e9), 1e9),  # The small root is less than the rounding of the large one.
    ],
    ids=str,
)
def test_growth_of_the_schemes(coupling, growth):
    assert coupling.growth == pytest.approx(growth)


def test_a_pass_keeps_the_coupling_that_it_began_with():
    sequence, x = stack(Scaled.consistent(0.9)).double(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    expected, loss = gradients(sequence, x), squares(sequence(x))
    set_coupling(sequence, Scaled.consistent(0.1))
    assert_close(torch.autograd.grad(loss, [x, *sequence.parameters()]), expected, tolerance=1e-12)


def test_log_det_of_the_factor():
    x = torch.zeros(2, 3, 4)
    assert_close(Scaled(-0.5).log_det(x, x), torch.full((2,), 12 * math.log(0.5)))
    assert Scaled.leapfrog().log_det(x, x) is None


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("value", ["1", None, True, math.nan, math.inf])
def test_rejects_a_wrong_factor(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` \(=.*\) must be a finite number"):
        Scaled(**{name: value})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Scaled.euler, "step_size"),
        (Scaled.midpoint, "step_size"),
        (Scaled.leapfrog, "step_size"),
        (Scaled.momentum, "gamma"),
        (Scaled.equilibrium, "beta"),
        (Scaled.consistent, "a"),
        (lambda value: Scaled.dual(value, 0.5), "alpha"),
        (lambda value: Scaled.dual(0.5, value), "beta"),
    ],
)
@pytest.mark.parametrize("value", ["1", None, math.nan])
def test_named_schemes_reject_wrong_arguments(make, name, value):
    with pytest.raises(ValueError, match=rf"`{name}` \(=.*\) must be a finite number"):
        make(value)


def test_rejects_a_factor_that_loses_the_stream():
    with pytest.raises(ValueError, match=r"`a` \(=0\) must not be 0, because the stream that is updated would be lost"):
        Scaled.dual(1.0, 0.0)


@pytest.mark.parametrize("coupling", [Scaled(0.5), Scaled(c=0.5), Scaled(b=2.0)], ids=str)
def test_rejects_a_wrong_residual(coupling):
    block = ReversibleBlock(nn.Linear(3, 1), nn.Linear(3, 3), coupling=coupling)
    with pytest.raises(ValueError, match=r"`f` returned shape \(4, 1\), but must return the shape of the stream"):
        block(torch.zeros(4, 6))
    block = ReversibleBlock(nn.LSTM(3, 3), nn.Linear(3, 3), coupling=coupling)
    with pytest.raises(TypeError, match=r"`f` returned tuple of 2, but must return one tensor"):
        block(torch.zeros(4, 6))
