import pytest
import torch
from torch import nn

from revnet.functional._chunked import chunked
from revnet.memory import measure
from tests.helpers import assert_close, gradients


def perceptron(frozen=False):
    layers = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    layers[1].weight.requires_grad_(not frozen)
    return layers


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("frozen", [False, True])
def test_equals_the_module(num_chunks, frozen):
    module, x = perceptron(frozen), torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (lambda x: chunked(module, x, num_chunks), module):
        module.zero_grad()
        y = function(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        y.square().sum().backward(inputs=[parameter for parameter in module.parameters() if parameter.requires_grad])
        results.append((y, grad, gradients(module)))
    assert_close(results[0], results[1], tolerance=1e-12)
    with torch.no_grad():
        assert_close(chunked(module, x, num_chunks), module(x), tolerance=1e-12)


def test_input_without_gradient():
    module, x = perceptron(), torch.randn(2, 7, 4, dtype=torch.float64)
    chunked(module, x, 3).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_double_backward():
    module, x = perceptron(), torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: chunked(module, x, 2), (x,))
    assert torch.autograd.gradgradcheck(lambda x: chunked(module, x, 2), (x,))


def test_backward_uses_the_autocast_of_the_forward_pass():
    module, x = perceptron().float(), torch.randn(2, 6, 4, requires_grad=True)
    results = []
    for function in (lambda x: chunked(module, x, 2), module):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, module[3].weight))))
    assert results[0][0].dtype == torch.bfloat16
    # The gradient of a weight is a sum of two chunks, each rounded to bfloat16's 8 bits: three roundings of 2^-9, of
    # numbers that may be larger than their sum.
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 2**-4 * expected.abs().max()


class Whole(nn.Module):
    def __init__(self, num_chunks):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 1024), nn.GELU(), nn.Linear(1024, 4))
        self.num_chunks = num_chunks

    def forward(self, x):
        return chunked(self.layers, x, self.num_chunks)


def test_stores_one_chunk_at_a_time():
    x = torch.randn(1, 512, 4)
    hidden = 512 * 1024 * 4
    held = [measure(Whole(num_chunks), x).held_bytes for num_chunks in (1, 8)]
    assert held[0] - held[1] == 2 * hidden  # before and after GELU; the input is stored in any case
    peaks = [measure(Whole(num_chunks), x).activation_bytes for num_chunks in (1, 8)]
    assert peaks[0] >= 3 * hidden  # and the gradient
    assert peaks[1] <= 3 * hidden / 8 + 6 * 4 * 1024 * 4  # plus gradients of both weights, their sums and new sums


class WithSpare(nn.Module):
    """Has a parameter that it does not use."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(4, 4), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return torch.tanh(self.used(x))


def test_an_unused_parameter_gets_no_gradient():
    module, x = WithSpare().double(), torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    chunked(module, x, 3).sum().backward()
    assert module.spare.grad is None
    chunked_gradients = x.grad.clone(), module.used.weight.grad.clone()
    x.grad = module.used.weight.grad = None
    module(x).sum().backward()
    assert_close((x.grad, module.used.weight.grad), chunked_gradients, tolerance=1e-12)
