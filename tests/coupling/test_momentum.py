import math

import pytest
import torch

from revnet import ReconstructionError, ReversibleSequential, errors
from revnet.coupling import Momentum
from revnet.nn import MomentumBlock
from tests.helpers import assert_close, mlp, squares


def test_matches_the_paper():
    """Compare with equation 3."""
    sequence = ReversibleSequential(*[MomentumBlock(mlp(3), gamma=0.7) for _ in range(3)]).double()
    x, v = torch.randn(2, 4, 3, dtype=torch.float64)
    y, w = sequence((x, v))
    for block in sequence:
        v = 0.7 * v + (1 - 0.7) * block.f(x)
        x = x + v
    assert_close((y, w), (x, v), tolerance=1e-14)
    assert_close(sequence.inverse((y, w)), sequence.inverse((x, v)), tolerance=1e-12)


def test_small_gamma_gives_a_residual_network():
    block = MomentumBlock(mlp(3), gamma=1e-8).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    assert_close(block((x, torch.zeros_like(x)))[0], x + block.f(x), tolerance=1e-5)  # Equal to first order in gamma.


def test_inverse_undoes_forward():
    coupling = Momentum(0.5)
    x, residual = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    y = coupling.forward(x, residual)
    assert_close(coupling.inverse(y, residual), x, tolerance=1e-14)
    result = coupling.inverse(y, residual, in_place=True)
    assert result.data_ptr() == y.data_ptr()
    assert_close(result, x, tolerance=1e-14)


def test_log_det_of_gamma():
    assert_close(
        Momentum(0.5).log_det(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)), torch.full((2,), 12 * math.log(0.5))
    )
    x = torch.zeros(2, 3, dtype=torch.complex128)  # Each element is two numbers.
    assert_close(Momentum(0.5).log_det(x, x), torch.full((2,), 6 * math.log(0.5), dtype=torch.float64))


def test_large_errors_of_deep_networks_are_reported():
    """The inverse divides by 0.3 a hundred times."""
    sequence = ReversibleSequential(*[MomentumBlock(mlp(3), gamma=0.3) for _ in range(100)])
    x = torch.randn(4, 6)
    with pytest.raises((ReconstructionError, errors.ReconstructionWarning)):
        squares(sequence(x)).backward()


@pytest.mark.parametrize("gamma", [0, 1, -0.5, "0.9", True, math.nan])
def test_rejects_a_wrong_gamma(gamma):
    with pytest.raises(ValueError, match=r"`gamma` .* must be between 0 and 1"):
        Momentum(gamma)


def test_rejects_a_wrong_residual():
    for method in (Momentum().forward, Momentum().inverse):
        with pytest.raises(ValueError, match=r"`f` returned shape \(3, 1\), but must return the shape of the stream"):
            method(torch.zeros(3, 4), torch.zeros(3, 1))


def test_rejects_a_function_that_is_not_a_module():
    with pytest.raises(TypeError, match=r"`f` .* must be an nn.Module"):
        MomentumBlock(torch.tanh)
