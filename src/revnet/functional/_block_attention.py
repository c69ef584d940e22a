"""Attention within blocks of queries and keys, with the sums that combine it with attention to other blocks.

Combining parts of one softmax needs their sums, which PyTorch's kernels do not return. Ordinary autograd would store
the scores, the weights and the masks, each with an entry per pair of query and key; the function below stores the
weights alone. The transforms of `torch.func` and forward-mode differentiation get ordinary autograd.
"""

from typing import Any

import torch
from torch import Tensor

from revnet.functional._context import is_transformed
from revnet.functional._once import differentiated_once

UNSEEN = -1e9
"""Score of an invisible key. It is finite, since padding tokens of the last block see no key at all."""
_ALONE = -1e5
"""Score of a key that counts only if the query sees no other key."""
_ONCE = (
    "`hierarchical_attention` and `lsh_attention` have no second derivatives, but their gradient was differentiated; "
    "use `full_attention`, or leave their gradient out of the loss."
)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, unseen: Tensor, *, bias: Tensor | None = None, alone: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the attention to a block of keys, and the logarithms of the softmax sums.

    Args:
        q: Queries, scaled.
        k: Keys.
        v: Values.
        unseen: True where a query does not see a key.
        bias: Values added to the scores. They get no gradient.
        alone: Diagonal (`offset` of `torch.diagonal`) whose pairs count only if the query sees no other key.

    Shape:
        q: (..., N, D); k, v: (..., M, D); unseen and bias: broadcastable to (..., N, M). Output: (..., N, D),
        and (..., N) in at least float32. Can be differentiated once; a second time raises `NotImplementedError`,
        except where ordinary autograd runs.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)
    if is_transformed():
        return _with_ordinary_autograd(q, k, v, unseen, bias, alone)
    y, log_sums = _BlockAttention.apply(q, k, v, unseen, bias, alone)
    return y, log_sums


def add_logarithms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return log(a + b). Either may be the logarithm of a sum over no keys, about `UNSEEN`."""
    if is_transformed():  # The second derivative of `logaddexp` is NaN there.
        return torch.stack((log_a, log_b)).logsumexp(0)
    return torch.logaddexp(log_a, log_b)


def _with_ordinary_autograd(
    q: Tensor, k: Tensor, v: Tensor, unseen: Tensor, bias: Tensor | None, alone: int | None
) -> tuple[Tensor, Tensor]:
    """Return what `_BlockAttention` returns, by functions that write to no tensor."""
    scores = q @ k.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        scores = scores + bias
    if alone is not None:
        pairs = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(pairs.triu(alone).tril(alone), _ALONE)
    scores = scores.masked_fill(unseen, UNSEEN)
    return (scores.softmax(-1).to(v.dtype) @ v).to(v.dtype), scores.logsumexp(-1)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, unseen: Tensor, bias: Tensor | None, alone: int | None
    ) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # in place from here on
        if bias is not None:
            scores += bias
        if alone is not None:
            scores.diagonal(alone, -2, -1).fill_(_ALONE)
        scores.masked_fill_(unseen, UNSEEN)
        weights = scores.softmax(-1)
        # Derive the sum from the largest score, since `logsumexp` is slow on scores as low as UNSEEN.
        log_sums = scores.amax(-1) - weights.amax(-1).log()
        weights = weights.to(v.dtype)
        y = (weights @ v).to(v.dtype)
        ctx.save_for_backward(q, k, v, weights, y)
        ctx.alone = alone
        return y, log_sums

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_log_sums: Tensor) -> Any:
        with torch.no_grad():
            gradients = _gradients(ctx, grad_y, grad_log_sums)
        sources = (*ctx.saved_tensors[:3], grad_y, grad_log_sums)
        return *[differentiated_once(gradient, sources, _ONCE) for gradient in gradients], None, None, None


def _gradients(ctx: Any, grad_y: Tensor, grad_log_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, weights, y = ctx.saved_tensors
    # The gradient of a score is its weight times (value minus mean value), plus its weight from the sum.
    shift = grad_log_sums - (grad_y * y).sum(-1).to(grad_log_sums.dtype)
    grad = grad_y @ v.mT
    grad = grad.to(shift.dtype).add_(shift[..., None]).mul_(weights).to(q.dtype)
    if ctx.alone is not None:
        grad.diagonal(ctx.alone, -2, -1).zero_()
    return grad @ k, grad.mT @ q, weights.mT @ grad_y
