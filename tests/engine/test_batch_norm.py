"""Batch norm in a replay: the faster statistics equal the ones of PyTorch's kernel."""

import pytest
import torch
from torch import nn

from revnet import ReversibleBlock, ReversibleSequential
from revnet.engine import _batch_norm
from revnet.engine._batch_norm import find_statistics
from tests.helpers import ConvResidual, assert_close, gradients, stored_twin

SHAPE = (8, 4, 48, 48)  # Large enough for the faster statistics.


def make_input(dtype=torch.float64):
    scale, shift = 10 ** torch.linspace(-1, 3, 4, dtype=torch.float64), 10 * torch.randn(4, dtype=torch.float64)
    x = torch.randn(SHAPE, dtype=torch.float64) * scale.view(1, 4, 1, 1) + shift.view(1, 4, 1, 1)
    return x.to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_statistics_are_accurate(dtype, tolerance):
    """The channels have means of up to a hundred standard deviations."""
    x = make_input(dtype)
    statistics = _batch_norm.find_statistics(x)
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert ((statistics.mean - mean).abs() <= tolerance * (mean.abs() + variance.sqrt())).all()
    torch.testing.assert_close(statistics.variance.double(), variance, rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 4, 8, 8),
        torch.randn(SHAPE).to(memory_format=torch.channels_last),
        torch.randn(SHAPE, dtype=torch.bfloat16),
        torch.randn(2**18, 4),
        torch.randn(SHAPE, device="meta"),
    ],
    ids=["small", "channels last", "bfloat16", "no pixels", "meta"],
)
def test_leaves_other_inputs_to_pytorch(x):
    assert _batch_norm.find_statistics(x) is None


@pytest.mark.parametrize("affine", [True, False])
def test_output_and_gradients_equal_the_module(affine):
    norm = nn.BatchNorm2d(4, affine=affine).double()
    x = make_input().requires_grad_()
    results = []
    for run in (norm, lambda x: _batch_norm.normalize(norm, x, _batch_norm.find_statistics(x))):
        y = run(x)
        inputs = [x, *norm.parameters()]
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    assert_close(*results, tolerance=1e-8)


def make_sequence():
    return ReversibleSequential(*[ReversibleBlock(ConvResidual(4), ConvResidual(4)) for _ in range(3)]).double()


def test_runs_on_rebuilt_streams_with_correct_results(monkeypatch):
    sequence = make_sequence()
    twin = stored_twin(sequence)
    seen = []

    def find(x):
        seen.append(x.shape)
        return find_statistics(x)

    monkeypatch.setattr(_batch_norm, "find_statistics", find)
    x = torch.randn(8, 8, 48, 48, dtype=torch.float64, requires_grad=True)
    twin_x = x.detach().clone().requires_grad_()
    sequence(x).sin().sum().backward()
    twin(twin_x).sin().sum().backward()
    assert len(seen) == 2 * (2 * 3 - 1)  # Not in the last function, whose input is not rebuilt.
    assert_close(x.grad, twin_x.grad)
    assert_close(gradients(sequence), gradients(twin))
    for buffer, expected in zip(sequence.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, expected)
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
    x = torch.randn(8, 8, 48, 48, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (sequence, twin):
        (grad,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
        results.append([grad, *torch.autograd.grad(grad.square().sum(), [x, *module.parameters()], allow_unused=True)])
    assert_close(*results, tolerance=1e-6)


def test_does_not_run_under_autocast(monkeypatch):
    """Low precision would amplify a difference in the last place."""
    monkeypatch.setattr(_batch_norm, "find_statistics", lambda *_: pytest.fail("used"))
    sequence = ReversibleSequential(*[ReversibleBlock(ConvResidual(4), ConvResidual(4)) for _ in range(2)])
    with torch.autocast("cpu", torch.bfloat16):
        loss = sequence(torch.randn(8, 8, 48, 48)).sum()
    loss.backward()
