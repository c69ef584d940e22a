"""Mixed precision: the replay runs under the autocast state of the forward pass, regardless of the state in the
backward pass."""

import pytest
import torch
from torch import nn

from revnet import ReversibleBlock, ReversibleSequential
from tests.helpers import CASE, mlp, squares, stored_twin


@pytest.mark.parametrize("input_requires_grad", [True, False])
@pytest.mark.parametrize("cache_enabled", [True, False])
@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("name", ["conv", "attention", "attention-context-mask", "mlp"])
def test_autocast(name, cache_enabled, backward_inside, input_requires_grad):
    case = CASE[name]
    sequence = case.sequence(3).float()
    twin = stored_twin(sequence)
    x = case.input().detach().float().requires_grad_(input_requires_grad)
    args = tuple(arg.detach().float() for arg in case.args())
    twin_x = x.detach().clone().requires_grad_(input_requires_grad)
    for module, start in ((sequence, x), (twin, twin_x)):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
            # Twice, so that the second call uses the cached casts of the first.
            loss = module(start, *args, **case.kwargs()).square().sum()
            loss = loss + module(start, *args, **case.kwargs()).sum()
            assert loss.dtype is torch.float32
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
    # A rebuilt float32 stream may round to another bfloat16: rarely, and by one unit in the last place, 2^-8.
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert (parameter.grad - expected.grad).norm() <= 1e-3 * expected.grad.norm()
    if input_requires_grad:
        assert (x.grad - twin_x.grad).norm() <= 1e-3 * twin_x.grad.norm()


def test_forward_without_autocast_and_backward_inside_it():
    case = CASE["conv"]
    sequence = case.sequence(3).float()
    twin = stored_twin(sequence)
    x = case.input(requires_grad=False).float()
    for module in (sequence, twin):
        loss = module(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
    # The replay must not run in bfloat16, which rounds by 2^-9 each time.
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert (parameter.grad - expected.grad).norm() <= 1e-4 * expected.grad.norm()


class InFullPrecision(nn.Module):
    """Disables autocast for a part of its computation."""

    def __init__(self):
        super().__init__()
        self.first, self.second = mlp(3), mlp(3)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            y = self.first(x.float())
        return self.second(y)


def test_function_that_disables_autocast():
    sequence = ReversibleSequential(*[ReversibleBlock(InFullPrecision(), mlp(3)) for _ in range(2)])
    twin = stored_twin(sequence)
    x = torch.randn(4, 6)
    for module in (sequence, twin):
        with torch.autocast("cpu", torch.bfloat16):
            loss = squares(module(x))
        loss.backward()
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert (parameter.grad - expected.grad).norm() <= 1e-2 * expected.grad.norm()
