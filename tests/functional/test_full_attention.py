"""Attention whose mask has numbers of documents, for some queries at a time."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from revnet.functional import _full_attention, full_attention
from tests.helpers import assert_close, squares

T = 11


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    monkeypatch.setattr(_full_attention, "_MOST_ROWS", 4)


def documents():
    return torch.tensor([[1] * 5 + [2] * 4 + [0] * 2, [1] * 2 + [2] * 9])


def inputs():
    return [torch.randn(2, 2, T, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def whole(q, k, v, *, is_causal):
    """Compute the same from the whole matrix of scores."""
    numbers = documents()
    seen = (numbers[:, None, :, None] == numbers[:, None, None, :]) & numbers[:, None, None, :].bool()
    if is_causal:
        seen = seen & torch.ones(T, T, dtype=torch.bool).tril()
    seen = seen | torch.eye(T, dtype=torch.bool)
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def by_rows(q, k, v, *, is_causal):
    return full_attention(q, k, v, mask=documents(), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)])
@pytest.mark.parametrize("is_linear", [False, True])
def test_derivatives(is_causal, frozen, is_linear):
    tensors, results = inputs(), []
    for index in frozen:
        tensors[index].requires_grad_(False)
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    factors = torch.randn(2, 2, T, 3, dtype=torch.float64)
    for function in (by_rows, whole):
        y = function(*tensors, is_causal=is_causal)
        loss = (y * factors).sum() if is_linear else squares(y)
        grads = torch.autograd.grad(loss, trained, create_graph=True)
        penalty = sum(squares(grad) for grad in grads)
        results.append((y, *grads, *torch.autograd.grad(penalty, trained)))
    assert_close(*results, tolerance=1e-12)


def test_derivatives_of_shared_inputs():
    (x, *_), results = inputs(), []
    for function in (by_rows, whole):
        (grad,) = torch.autograd.grad(squares(function(x, x, x, is_causal=True)), x, create_graph=True)
        results.append((grad, *torch.autograd.grad(squares(grad), x)))
    assert_close(*results, tolerance=1e-12)


@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients(create_graph):
    tensors = inputs()
    vectors = torch.randn(2, 2, 2, T, 3, dtype=torch.float64)
    results = [
        torch.autograd.grad(
            function(*tensors, is_causal=True), tensors, vectors, is_grads_batched=True, create_graph=create_graph
        )
        for function in (by_rows, whole)
    ]
    assert_close(*results, tolerance=1e-12)


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_low_precision_are_summed_in_float32(create_graph):
    """In bfloat16, 256 + 1 is 256. All weights are 1 / 16."""
    q, k, v = (torch.zeros(1, 1, 16, 2, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    vector = torch.zeros(1, 1, 16, 2, dtype=torch.bfloat16)
    vector[:, :, 0], vector[:, :, 4], vector[:, :, 8] = 16 * 256, 16, 16  # in three parts
    y = full_attention(q, k, v, mask=torch.ones(1, 16, dtype=torch.long))
    (grad,) = torch.autograd.grad(y, v, vector, create_graph=create_graph)
    assert torch.equal(grad, torch.full_like(grad, 258))


def test_transforms_of_functions():
    tensors = [tensor.detach() for tensor in inputs()]
    with sdpa_kernel(SDPBackend.MATH):
        grads = [
            torch.func.grad(lambda q, function=function: squares(function(q, *tensors[1:], is_causal=True)))(tensors[0])
            for function in (by_rows, whole)
        ]
    assert_close(*grads, tolerance=1e-12)
