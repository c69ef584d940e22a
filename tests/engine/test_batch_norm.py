"""Batch norm in a replay: it uses the statistics of the first run, and repeats it bit for bit."""

import pytest
import torch
from torch import nn

from revnet import Checkpoint, Reverse, ReversibleBlock, ReversibleSequential
from revnet.engine import _batch_norm
from revnet.engine._batch_norm import Statistics
from revnet.nn import BatchNorm2dBiased
from tests.helpers import ConvResidual, assert_close, gradients, stored_twin

SHAPE = (8, 4, 96, 96)
FORMATS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: x.transpose(2, 3),
}


def make_input(dtype):
    """Channels have means of up to a hundred standard deviations."""
    scale, shift = 10 ** torch.linspace(-1, 3, 4, dtype=torch.float64), 10 * torch.randn(4, dtype=torch.float64)
    x = torch.randn(SHAPE, dtype=torch.float64) * scale.view(1, 4, 1, 1) + shift.view(1, 4, 1, 1)
    return x.to(dtype)


class ByName(nn.Module):
    """Passes the input of its batch norm by name."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(input=self.conv(x))


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()])
def test_takes_its_input_by_name(policy):
    sequence = ReversibleSequential(*[ReversibleBlock(ByName(), ByName()) for _ in range(2)], policy=policy)
    sequence = sequence.double()
    twin, x = stored_twin(sequence), torch.randn(8, 8, 96, 96, dtype=torch.float64)
    for module in (sequence, twin):
        module(x).square().mean().backward()
    assert_close(gradients(sequence), gradients(twin))


def replayed(norm, x):
    """Return the output of the batch norm for given statistics."""
    _, mean, inverse = torch.native_batch_norm(x.detach(), norm.weight, norm.bias, None, None, True, 0.1, norm.eps)
    return _batch_norm._Normalizing(norm, {0: Statistics(mean, inverse)}, [], set())(x)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_output_and_gradients_equal_the_module(affine, dtype, memory_format):
    norm = nn.BatchNorm2d(4, affine=affine, track_running_stats=False)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    if dtype == torch.float64:
        norm.double()
    x = FORMATS[memory_format](make_input(dtype)).requires_grad_()
    results = []
    for run in (norm, lambda x: replayed(norm, x)):
        y = run(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *norm.parameters()])])
    for expected, result in zip(*results, strict=True):
        assert torch.equal(result, expected)


def make_sequence(norm=nn.BatchNorm2d, policy="reverse"):
    blocks = [ReversibleBlock(ConvResidual(4), ConvResidual(4)) for _ in range(3)]
    for block in blocks:
        block.g.norm1 = norm(4)
    return ReversibleSequential(*blocks, policy=policy)


def count_uses(monkeypatch):
    uses = []
    apply = _batch_norm._Normalize.apply
    monkeypatch.setattr(_batch_norm._Normalize, "apply", lambda x, *rest: uses.append(x.shape) or apply(x, *rest))
    return uses


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm2dBiased])
def test_each_norm_in_a_replay_uses_the_statistics(monkeypatch, norm):
    uses = count_uses(monkeypatch)
    sequence = make_sequence(norm).double()
    twin = stored_twin(sequence)
    x = torch.randn(8, 8, 96, 96, dtype=torch.float64, requires_grad=True)
    twin_x = x.detach().clone().requires_grad_()
    sequence(x).sin().sum().backward()
    twin(twin_x).sin().sum().backward()
    assert len(uses) == 2 * 2 * 3
    assert_close(x.grad, twin_x.grad)
    assert_close(gradients(sequence), gradients(twin))
    for buffer, expected in zip(sequence.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, expected)
    assert all("forward" not in module.__dict__ for module in sequence.modules())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_checkpoints_equal_plain_autograd_bit_for_bit(monkeypatch, dtype):
    uses = count_uses(monkeypatch)
    sequence = make_sequence(policy=Checkpoint())
    twin = stored_twin(sequence)
    x = torch.randn(8, 8, 96, 96)
    for module in (sequence, twin):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            loss = module(x).sin().sum()
        loss.backward()
    assert len(uses) == 2 * 2 * 3
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


def test_small_streams_use_pytorch(monkeypatch):
    uses = count_uses(monkeypatch)
    make_sequence()(torch.randn(4, 8, 16, 16)).sum().backward()
    assert not uses


class Skips(nn.Module):
    """A residual function whose two norms run in an order that alternates."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x, number):
        first, second = self.norms if number % 2 == 0 else reversed(self.norms)
        x = first(x).sin()
        return x if number == 2 else second(x)


@pytest.mark.parametrize("numbers", [(0, 1, 2), (2, 1, 0)])
def test_statistics_belong_to_one_call(numbers):
    sequence = ReversibleSequential(*[ReversibleBlock(Skips(), Skips()) for _ in range(2)]).double()
    twin = stored_twin(sequence)
    for number in numbers:
        x = torch.randn(8, 8, 96, 96, dtype=torch.float64)
        for module in (sequence, twin):
            module(x, number).sin().sum().backward()
    assert_close(gradients(sequence), gradients(twin))


class Around(nn.Module):
    """A residual function with a sequence inside, whose norm it also calls itself."""

    def __init__(self):
        super().__init__()
        self.inner = ReversibleSequential(*[ReversibleBlock(ConvResidual(4), ConvResidual(4)) for _ in range(2)])
        self.norm = self.inner.blocks[0].f.norm1

    def forward(self, x):
        y = self.inner(torch.cat((x, x), 1))
        return self.norm(y[:, :4].contiguous()) + y[:, 4:]


def test_sequence_inside_a_residual_function():
    sequence = ReversibleSequential(*[ReversibleBlock(Around(), ConvResidual(4)) for _ in range(2)]).double()
    twin = stored_twin(sequence)
    x = torch.randn(8, 8, 96, 96, dtype=torch.float64)
    for module in (sequence, twin):
        module(x).sin().sum().backward()
    assert_close(gradients(sequence), gradients(twin))
    assert all("forward" not in module.__dict__ for module in sequence.modules())


def test_double_backward_and_inner_differentiation():
    class Inside(nn.Module):
        """A residual that is itself a gradient through a batch norm."""

        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            with torch.enable_grad():
                start = x if x.requires_grad else x.detach().requires_grad_()
                energy = self.norm(start).sin().sum()
                return torch.autograd.grad(energy, start, create_graph=True)[0]

    sequence = ReversibleSequential(*[ReversibleBlock(Inside(), ConvResidual(4)) for _ in range(2)]).double()
    twin = stored_twin(sequence)
    x = torch.randn(8, 8, 96, 96, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (sequence, twin):
        (grad,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
        try:
            more = torch.autograd.grad(grad.square().sum(), [x, *module.parameters()], allow_unused=True)
        except RuntimeError as error:  # PyTorch 2.15 refuses a third derivative of a batch norm, in the twin too.
            if "batch_norm does not support 3rd+ order derivatives" not in str(error):
                raise
            more = ()
        results.append([grad, *more])
    assert len(results[0]) == len(results[1])
    assert_close(*results, tolerance=1e-6)
