import pytest
import torch
from torch import nn

from revnet import Checkpoint, Reverse, ReversibleBlock, ReversibleSequential, Store, set_policy
from revnet.coupling import Affine
from revnet.memory import measure
from revnet.nn import AbstractInvertible, CouplingLayer, HaarWavelet, InvertibleSequential, SpaceToDepth
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


class ShiftedBy(nn.Module):
    """Shift and scale of a stream, given the other stream and a context, an argument of its own or a keyword."""

    def __init__(self, num_features, num_outputs):
        super().__init__()
        self.linear = nn.Linear(num_features, num_outputs)

    def forward(self, x, context=None, *, scale=None):
        y = self.linear(x if context is None else x + context)
        return torch.tanh(y if scale is None else y * scale)


class Shift(AbstractInvertible):
    """A layer that takes the context, too."""

    takes_arguments = True

    def forward(self, x, context):
        return x + context.repeat(1, 2)

    def inverse(self, y, context):
        return y - context.repeat(1, 2)

    def forward_with_log_det(self, x, context):
        return self(x, context), torch.zeros(len(x), dtype=x.dtype)


def conditional(policy=None):
    layers = [CouplingLayer(ShiftedBy(3, 6), updates=index % 2, coupling=Affine()) for index in range(4)]
    blocks = [ReversibleBlock(ShiftedBy(3, 3), ShiftedBy(3, 3)) for _ in range(2)]
    inner = InvertibleSequential(*blocks, policy=policy or Reverse())
    return InvertibleSequential(*layers, Shift(), inner, policy=policy or Reverse()).double()


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_inverse_and_log_determinant_of_a_conditional_flow():
    model, x, context = conditional(), leaf(4, 6), leaf(4, 3)
    y, log_det = model.forward_with_log_det(x, context)
    assert torch.equal(y, model(x, context))
    assert torch.equal(log_det, model.log_det(x, context))
    assert_close(model.inverse(y, context), x, tolerance=1e-12)
    assert not torch.allclose(y, model(x, context + 1))
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None], context[:1])[0], x[0].detach())
    assert_close(log_det[0], jacobian.slogdet().logabsdet, tolerance=1e-12)


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()])
def test_gradients_of_the_context_equal_the_stored_twin(policy):
    model, twin = conditional(policy), conditional(Store())
    twin.load_state_dict(model.state_dict())
    x, context, scale = leaf(4, 6), leaf(4, 3), leaf(4, 3)
    found = []
    for module in (model, twin):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, context, scale)]
        y, log_det = module.forward_with_log_det(leaves[0], leaves[1], g_kwargs={"scale": leaves[2]})
        (squares(y) - log_det.sum()).backward()
        found.append({**gradients(module), "inputs": [tensor.grad for tensor in leaves]})
    assert_close(found[0], found[1])
    assert found[0]["inputs"][-1].abs().sum() > 0


def test_arguments_of_one_function_reach_only_the_blocks_that_have_it():
    model = conditional()
    x, context = leaf(4, 6), leaf(4, 3)
    y = model(x, context, g_kwargs={"scale": torch.zeros(4, 3, dtype=torch.float64)})
    assert not torch.equal(y, model(x, context))
    assert_close(
        model.inverse(y, context, g_kwargs={"scale": torch.zeros(4, 3, dtype=torch.float64)}), x, tolerance=1e-12
    )


def test_rejects_arguments_that_no_layer_takes():
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(TypeError, match=r"`args` is an additional argument, but no layer of the network takes one"):
        InvertibleSequential(SpaceToDepth(), InvertibleSequential(HaarWavelet()))(x, x)
    with pytest.raises(TypeError, match=r"`mask` is an additional argument, but no layer"):
        InvertibleSequential(SpaceToDepth()).inverse(torch.randn(1, 4, 2, 2), mask=x)
    with pytest.raises(TypeError, match=r"`g_kwargs` is for residual functions named `g`, and the network has none"):
        InvertibleSequential(CouplingLayer(ShiftedBy(3, 3)))(torch.randn(4, 6), g_kwargs={"scale": 1})


def test_rejects_a_layer_that_returns_a_pair():
    class Halves(AbstractInvertible):
        def forward(self, x):
            return tuple(x.chunk(2, 1))

        def inverse(self, y):
            return torch.cat(y, 1)

        def forward_with_log_det(self, x):
            return self(x), torch.zeros(len(x))

    model = InvertibleSequential(SpaceToDepth(), Halves(), SpaceToDepth())
    for run in (model, model.forward_with_log_det):
        with pytest.raises(TypeError, match=r"Halves returned tuple of 2, but .* use `MultiScaleSequential`"):
            run(torch.randn(1, 1, 4, 4))
