import pytest
import torch
from torch import nn

from revnet import Checkpoint, Reverse, ReversibleBlock, ReversibleSequential, Store, set_policy
from revnet.coupling import Affine
from revnet.memory import measure
from revnet.nn import CouplingLayer, HaarWavelet, InvertibleSequential, SpaceToDepth
from tests.helpers import ConvResidual, assert_close, gradients, mlp, scaling_mlp, squares


def network(depth=2, policy=None):
    def blocks(num_channels):
        return [ReversibleBlock(ConvResidual(num_channels), ConvResidual(num_channels)) for _ in range(depth)]

    layers = [SpaceToDepth(), *blocks(2), HaarWavelet(), *blocks(8)]
    return InvertibleSequential(*layers, policy=policy or Reverse())


def test_consecutive_blocks_form_one_sequence():
    block = lambda: ReversibleBlock(mlp(2), mlp(2))  # noqa: E731
    other = ReversibleBlock(mlp(4), mlp(4), split_dim=0)
    model = InvertibleSequential(block(), block(), other, InvertibleSequential(block()), block(), CouplingLayer(mlp(2)))
    kinds = [(type(layer), len(layer)) for layer in model.layers]
    assert kinds == [
        (ReversibleSequential, 2),
        (ReversibleSequential, 1),
        (InvertibleSequential, 1),
        (ReversibleSequential, 2),
    ]
    x = torch.randn(4, 4)
    assert_close(model.inverse(model(x)), x, tolerance=1e-5)  # roundings of float32


def test_inverse_returns_the_images():
    model = network().eval()
    x = torch.randn(2, 1, 8, 8)
    y = model(x)
    assert y.shape == (2, 16, 2, 2)
    assert_close(model.inverse(y), x, tolerance=1e-5)  # roundings of float32


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()])
def test_training_step_equals_the_stored_twin(policy):
    model, twin = network(policy=policy).double(), network(policy=Store()).double()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    for module in (model, twin):
        squares(module(x)).backward()
    assert_close(gradients(model), gradients(twin))


def test_memory_does_not_grow_with_the_number_of_blocks():
    def activation_bytes(depth, policy):
        return measure(network(depth, policy), torch.randn(2, 1, 16, 16)).activation_bytes

    assert activation_bytes(2, Reverse()) == activation_bytes(4, Reverse()) == activation_bytes(8, Reverse())
    assert activation_bytes(8, Store()) > 3 * activation_bytes(8, Reverse())


def test_blocks_get_the_policy():
    model = network()
    set_policy(model, Store())
    assert [layer.policies for layer in model.layers if isinstance(layer, ReversibleSequential)] == [(Store(),) * 2] * 2


def test_density_model_learns():
    """Train a small flow on points along a line: the likelihood of the data rises."""
    torch.manual_seed(0)
    layers = [CouplingLayer(scaling_mlp(1), updates=index % 2, coupling=Affine()) for index in range(4)]
    model = InvertibleSequential(*layers)
    prior = torch.distributions.Normal(0, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        first = torch.randn(64, 1)
        z, log_det = model.forward_with_log_det(torch.cat((first, first + 0.1 * torch.randn(64, 1)), 1))
        loss = -(prior.log_prob(z).sum(1) + log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_no_layers_are_the_identity():
    x = torch.randn(2, 3)
    model = InvertibleSequential()
    assert model(x) is x
    assert model.inverse(x) is x
    assert torch.equal(model.log_det(x), torch.zeros(2))


def test_rejects_layers_that_are_not_invertible():
    with pytest.raises(TypeError, match=r"`layers\[1\]` \(=Conv2d\) must be an invertible layer, such as"):
        InvertibleSequential(SpaceToDepth(), nn.Conv2d(4, 4, 1))
