"""Residual functions of all kinds: what they contain, what they keep, and what they compute inside."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from revnet import ReconstructionError, Reverse, ReversibleBlock, ReversibleSequential, Store
from tests.helpers import (
    Attention,
    assert_close,
    assert_same_buffers,
    gradients,
    mlp,
    right_or_raises,
    squares,
    stored_twin,
)


class Energy(nn.Module):
    """Differentiates inside `forward`: the residual is the gradient of an energy."""

    def __init__(self):
        super().__init__()
        self.layers = mlp(4)

    def forward(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.layers(x).square().sum(), x, create_graph=True)[0]


class ScaledOnce(torch.autograd.Function):
    """Reads its saved tensors twice in one backward pass."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        _, weight = ctx.saved_tensors
        x, _ = ctx.saved_tensors
        return grad * weight, (grad * x).sum((0, 1))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return ScaledOnce.apply(x.tanh(), self.weight)


class Computing(nn.Module):
    """Two linear layers, combined by an expression."""

    def __init__(self, compute: Callable[[nn.Module, nn.Module, Tensor], Tensor]):
        super().__init__()
        self.first, self.second, self.compute = nn.Linear(4, 4), nn.Linear(4, 4), compute

    def forward(self, x):
        return self.compute(self.first, self.second, x)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Normalized(nn.Module):
    """Batch norm over the last dimension."""

    def __init__(self, **options):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4, **options), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.norm(x.transpose(1, 2)).transpose(1, 2))


def frozen_half(first, second, x):
    with torch.no_grad():
        scale = second(x)
    return first(x).tanh() * scale


FUNCTIONS = {
    "differentiates inside itself": Energy,
    "unpacks twice": Scaled,
    "multi-head attention": SelfAttention,
    "encoder layer": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    "batch norm, cumulative average": lambda: Normalized(momentum=None),
    "batch norm, no statistics": lambda: Normalized(track_running_stats=False),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
    "spectral norm, older": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "alpha dropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.AlphaDropout(0.3)),
    "feature alpha dropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.FeatureAlphaDropout(0.3)),
    "dropout in place": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3, inplace=True)),
    "gumbel softmax": lambda: Computing(lambda first, second, x: second(F.gumbel_softmax(first(x), hard=True))),
    "two uses of one layer": lambda: Computing(lambda first, second, x: first(second(first(x).tanh())).tanh()),
    "detached half": lambda: Computing(lambda first, second, x: first(x).tanh() * second(x).detach()),
    "half without gradients": lambda: Computing(frozen_half),
    "unused layer": lambda: Computing(lambda first, second, x: first(x).tanh()),
    "constant": lambda: Computing(lambda first, second, x: first.bias.expand_as(x)),
    "zero": lambda: Computing(lambda first, second, x: torch.zeros_like(x)),
    "no parameters": nn.Tanh,
    "sort": lambda: Computing(lambda first, second, x: second(first(x).sort(-1).values)),
    "fft": lambda: Computing(lambda first, second, x: second(torch.fft.irfft(torch.fft.rfft(first(x)), n=4)).tanh()),
    "einsum": lambda: Computing(lambda first, second, x: torch.einsum("btc,bsc,bsd->btd", first(x), second(x), x) / 9),
}


@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_functions_train_like_the_stored_twin(make):
    outcomes = []
    for policy in (Reverse(), Store()):
        torch.manual_seed(3)
        blocks = [ReversibleBlock(make(), make(), split_dim=-1) for _ in range(3)]
        sequence = ReversibleSequential(*blocks, policy=policy).double()
        x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
        y = sequence(x)
        squares(y).backward()
        outcomes.append((sequence, y, [x.grad, gradients(sequence)], torch.get_rng_state()))
    (sequence, y, grads, state), (twin, expected, expected_grads, expected_state) = outcomes
    assert torch.equal(y, expected)
    assert torch.equal(state, expected_state)
    assert_close(grads, expected_grads)
    assert_same_buffers(sequence, twin)


class Routed(nn.Module):
    """Stores an auxiliary loss as an attribute, as mixture-of-experts layers do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = self.first(x).tanh()
        self.loss = h.exp().mean()
        return self.second(h)


@pytest.mark.parametrize("weight", [0.0, 1.0], ids=["alone", "with the output"])
def test_auxiliary_losses_in_attributes(weight):
    """The losses belong to the forward graph, and reach the saved tensors on a different path from the output."""
    sequence = ReversibleSequential(*[ReversibleBlock(Routed(), Routed()) for _ in range(3)]).double()
    twin = stored_twin(sequence)
    x = torch.randn(4, 6, dtype=torch.float64)
    results = []
    for module in (sequence, twin):
        loss = weight * squares(module(x)) if weight else module(x).detach().sum()
        (loss + sum(block.f.loss * 2 + block.g.loss for block in module)).backward()
        results.append(gradients(module))
    assert_close(*results)


class Scaling(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("scale", torch.randn(shape))

    def forward(self, x):
        return torch.tanh(self.linear(x) * self.scale)


@pytest.mark.parametrize("shape", [(3,), (4, 3)], ids=["vector", "matrix"])
def test_buffers_replaced_between_forward_and_backward(shape):
    """Each run keeps the tensors that its forward pass used."""
    sequence = ReversibleSequential(*[ReversibleBlock(Scaling(*shape), mlp(3)) for _ in range(3)]).double()
    twin = stored_twin(sequence)
    x = torch.randn(4, 6, dtype=torch.float64)
    for module in (sequence, twin):
        loss = squares(module(x))
        for block in module:
            block.f.scale = block.f.scale + 1
            block.f.linear.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
        loss.backward()
    assert_close(gradients(sequence), gradients(twin))


def test_kernels_chosen_around_the_forward_pass_only():
    """Outside of the context, another kernel may run, and save different tensors."""
    sequence = ReversibleSequential(*[ReversibleBlock(Attention(4), Attention(4), split_dim=-1) for _ in range(2)])
    twin = stored_twin(sequence)
    x = torch.randn(2, 5, 8)

    def train(module):
        with sdpa_kernel(SDPBackend.MATH):
            loss = squares(module(x))
        loss.backward()

    train(twin)
    with right_or_raises("did something else when it ran again"):
        train(sequence)
        assert_close(gradients(sequence), gradients(twin), tolerance=1e-4)


class OverwritesWhatIsSaved(nn.Linear):
    """Sigmoid saves its output, which is then overwritten."""

    def forward(self, x):
        return super().forward(x).sigmoid().add_(1)


def test_saved_tensor_overwritten_by_the_function_raises_as_in_the_twin():
    sequence = ReversibleSequential(*[ReversibleBlock(OverwritesWhatIsSaved(3, 3), nn.Linear(3, 3)) for _ in range(2)])
    for module in (sequence, stored_twin(sequence)):
        loss = module(torch.randn(4, 6)).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("depth", [1, 2])
def test_operation_that_saves_memory_before_it_computes(depth):
    """RReLU's noise, saved by the last operation of the lowest function."""
    blocks = [ReversibleBlock(nn.Sequential(nn.Linear(3, 3), nn.RReLU()), nn.RReLU()) for _ in range(depth)]
    sequence = ReversibleSequential(*blocks).double()
    twin = stored_twin(sequence)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    twin_x = x.detach().clone().requires_grad_()
    for module, start in ((sequence, x), (twin, twin_x)):
        torch.manual_seed(1)
        module(start).square().sum().backward()
    assert_close(x.grad, twin_x.grad)
    assert_close(gradients(sequence), gradients(twin))


class Holder(nn.Module):
    """Keeps a tensor in a list, where it is not registered with the module."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.held = [torch.randn(2, 3, dtype=torch.float64)]

    def forward(self, x):
        return (self.linear(x) * self.held[0][1]).tanh()


@pytest.mark.parametrize("change", ["modified", "replaced"])
def test_unregistered_tensor_that_changes_raises(change):
    sequence = ReversibleSequential(*[ReversibleBlock(Holder(), Holder()) for _ in range(2)]).double()
    loss = sequence(torch.randn(4, 6, dtype=torch.float64)).sum()
    held = sequence[0].f.held
    held[0] = held[0].add_(1) if change == "modified" else held[0] + 1
    with pytest.raises(RuntimeError, match=r"was modified in place|used a different tensor"):
        loss.backward()


def test_unregistered_tensor_that_does_not_change():
    sequence = ReversibleSequential(*[ReversibleBlock(Holder(), Holder()) for _ in range(2)]).double()
    twin = stored_twin(sequence)
    x = torch.randn(4, 6, dtype=torch.float64)
    for module in (sequence, twin):
        module(x).square().sum().backward()
    assert_close(gradients(sequence), gradients(twin))


class Stash(nn.Linear):
    """Stores its activations as attributes, with their graph and without."""

    def forward(self, x):
        self.seen = super().forward(x).tanh()
        self.mask = (self.seen > 0).to(x.dtype)
        self.weights = self.seen.detach().softmax(-1)
        return self.seen * self.mask * self.weights


def test_function_that_stores_its_activations():
    sequence = ReversibleSequential(*[ReversibleBlock(Stash(3, 3), Stash(3, 3)) for _ in range(3)]).double()
    twin = stored_twin(sequence)
    x = torch.randn(4, 6, dtype=torch.float64)
    for module in (sequence, twin):
        for _ in range(2):
            module(x).square().sum().backward()
    assert_close(gradients(sequence), gradients(twin))


class DrawsOnce(nn.Linear):
    """Draws random numbers without an effect, only on the first call, as another thread would."""

    drawn = 0

    def forward(self, x):
        x = nn.functional.dropout(super().forward(x), 0.5)
        if self.drawn == 0:
            torch.rand(1)
        self.drawn += 1
        return x


def test_different_random_numbers_in_the_replay_raise():
    sequence = ReversibleSequential(ReversibleBlock(DrawsOnce(3, 3), DrawsOnce(3, 3)))
    state = torch.get_rng_state()
    loss = sequence(torch.randn(4, 6)).sum()
    with pytest.raises(ReconstructionError, match="did not draw the same random numbers"):
        loss.backward()
    assert not torch.equal(torch.get_rng_state(), state)


def test_vector_buffer_written_to_before_backward():
    """The replay reads the old values, as the function did; the new values remain."""

    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("scale", torch.ones(3))

        def forward(self, x):
            return super().forward(x).tanh() + self.scale.sum()

    sequence = ReversibleSequential(*[ReversibleBlock(Scaled(), Scaled()) for _ in range(2)]).double()
    twin = stored_twin(sequence)
    x = torch.randn(4, 6, dtype=torch.float64)
    for module in (sequence, twin):
        loss = module(x).square().sum()
        for block in module:
            block.f.scale.add_(1)
        loss.backward()
        assert all(torch.equal(block.f.scale, torch.full((3,), 2.0, dtype=torch.float64)) for block in module)
    assert_close(gradients(sequence), gradients(twin))


def test_lazy_parameters_raise():
    sequence = ReversibleSequential(ReversibleBlock(nn.LazyLinear(3), nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="`weight` of LazyLinear has no shape yet; call the residual function once"):
        sequence(torch.randn(4, 6))
    with torch.no_grad():
        sequence[0].f(torch.randn(4, 3))
    sequence(torch.randn(4, 6)).sum().backward()
