import pytest
import torch
from torch import nn

from revnet import ReversibleBlock, ReversibleSequential
from revnet.coupling import Affine
from revnet.nn import CouplingLayer
from tests.helpers import assert_close, mlp, scaling_mlp, squares


def test_alternating_layers_equal_blocks():
    functions = [mlp(3) for _ in range(6)]
    layers = ReversibleSequential(*[CouplingLayer(f, updates=i % 2) for i, f in enumerate(functions)]).double()
    blocks = ReversibleSequential(*[ReversibleBlock(*functions[i : i + 2]) for i in (0, 2, 4)]).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(layers(x), blocks(x))
    assert_close(layers.inverse(layers(x)), x, tolerance=1e-13)
    gradients = []
    for module in (layers, blocks):
        module.zero_grad()
        squares(module(x)).backward()
        gradients.append([p.grad for p in module.parameters()])
    for gradient, expected in zip(*gradients, strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("updates", [0, 1])
def test_one_stream_is_unchanged(updates):
    layer = CouplingLayer(scaling_mlp(3), updates=updates, coupling=Affine()).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    y = layer((x[0], x[1]))
    assert torch.equal(y[1 - updates], x[1 - updates])
    assert_close(y[updates], Affine().forward(x[updates], layer.f(x[1 - updates])))


def test_streams_of_different_sizes():
    layer = CouplingLayer(nn.Linear(2, 5), updates=0)
    y1, y2 = layer((torch.randn(3, 5), torch.randn(3, 2)))
    assert y1.shape == (3, 5)
    assert y2.shape == (3, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"f": torch.tanh}, TypeError, r"`f` .* must be an nn.Module"),
        ({"updates": 2}, ValueError, r"`updates` \(=2\) must be 0 for the first"),
        ({"coupling": "affine"}, TypeError, r"`coupling` \(='affine'\) must be a coupling"),
    ],
)
def test_rejects_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        CouplingLayer(**{"f": mlp(3), **arguments})


def test_repr_shows_options_that_differ_from_the_default():
    assert "updates=1, split_dim=-1, coupling=Affine" in repr(
        CouplingLayer(mlp(3), updates=1, split_dim=-1, coupling=Affine())
    )
