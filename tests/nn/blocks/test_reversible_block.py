import pytest
import torch
from torch import nn

from revnet import ReversibleBlock
from revnet.memory import measure
from tests.helpers import SAMPLE, ConvResidual, mlp


def test_block_computes_the_equations_of_the_paper():
    """y1 = x1 + f(x2), y2 = x2 + g(y1)."""
    f, g = mlp(2), mlp(2)
    x1, x2 = torch.randn(3, 2), torch.randn(3, 2)
    y1, y2 = ReversibleBlock(f, g)((x1, x2))
    assert torch.equal(y1, x1 + f(x2))
    assert torch.equal(y2, x2 + g(y1))


def test_single_block_rebuilds_activations():
    block = ReversibleBlock(ConvResidual(8), ConvResidual(8))
    stream = 2 * 8 * 16 * 16 * 4
    assert measure(block, torch.randn(2, 16, 16, 16)).held_bytes == 2 * stream + SAMPLE + 4


def test_streams_of_different_shapes():
    f, g = nn.Linear(5, 3), nn.Linear(3, 5)
    block = ReversibleBlock(f, g).double()
    x1, x2 = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    y1, y2 = block((x1, x2))
    assert (y1.shape, y2.shape) == (x1.shape, x2.shape)
    torch.testing.assert_close(block.inverse((y1, y2)), (x1, x2))


@pytest.mark.parametrize("role", ["f", "g"])
def test_rejects_a_function_that_is_not_a_module(role):
    functions = {"f": nn.Linear(2, 2), "g": nn.Linear(2, 2)} | {role: torch.tanh}
    with pytest.raises(TypeError, match=rf"`{role}` \(=.*tanh.*\) must be an nn.Module.*wrap the function"):
        ReversibleBlock(**functions)


def test_error_about_a_wrong_shape_names_the_function():
    block = ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"`g` returned shape \(4, 3\), but must return .* \(4, 2\)"):
        block(torch.randn(4, 4))


def test_function_that_modifies_its_input_raises():
    block = ReversibleBlock(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2)), nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=r"`f` modified its input in place.*`inplace=False`"):
        block(torch.randn(4, 4))


def test_repr_shows_the_split():
    assert "split_dim" not in repr(ReversibleBlock(nn.Identity(), nn.Identity()))
    assert "split_dim=-1" in repr(ReversibleBlock(nn.Identity(), nn.Identity(), split_dim=-1))
