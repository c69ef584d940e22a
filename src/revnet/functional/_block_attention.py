"""Attention within blocks of queries and keys, and what is needed to join it with attention to other blocks.

PyTorch's kernels return no sums, without which parts of one softmax cannot be joined. By ordinary autograd the scores,
the weights and the masks would all be kept, each as large as all pairs of queries and keys; this keeps the weights.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

UNSEEN = -1e9
"""The score of what a token does not see; finite, since some see nothing, as the padding of the last block."""
_ALONE = -1e5
"""The score of what counts only where there is nothing else."""


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, unseen: Tensor, *, bias: Tensor | None = None, alone: int | None = None
) -> tuple[Tensor, Tensor]:
    """The softmax over a block of keys, and the logarithms of the sums that divided it.

    Args:
        q: Queries, scaled.
        k: Keys.
        v: Values.
        unseen: Which keys a query does not see.
        bias: Added to the scores; gets no gradient.
        alone: A diagonal, as `torch.diagonal` counts them: pairs that count only where there is nothing else.

    Shape:
        q: (..., N, D); k, v: (..., M, D); unseen and bias: any that fits (..., N, M). Output: (..., N, D), and (..., N)
        in float32 or more. Can be differentiated once.
    """
    y, log_sums = _BlockAttention.apply(q, k.to(q.dtype), v.to(q.dtype), unseen, bias, alone)
    return y, log_sums


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, unseen: Tensor, bias: Tensor | None, alone: int | None
    ) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # what follows is in place
        if bias is not None:
            scores += bias
        if alone is not None:
            scores.diagonal(alone, -2, -1).fill_(_ALONE)
        scores.masked_fill_(unseen, UNSEEN)
        weights = scores.softmax(-1)
        # The largest score tells the sum: `exp` itself, as in `logsumexp`, is slow on scores as low as the unseen's.
        log_sums = scores.amax(-1) - weights.amax(-1).log()
        weights = weights.to(v.dtype)
        y = (weights @ v).to(v.dtype)
        ctx.save_for_backward(q, k, v, weights, y)
        ctx.alone = alone
        return y, log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_log_sums: Tensor) -> Any:
        q, k, v, weights, y = ctx.saved_tensors
        # Of a score: its weight, times what its value has above the mean of values; and of the sum, its weight.
        shift = grad_log_sums - (grad_y * y).sum(-1).to(grad_log_sums.dtype)
        grad = grad_y @ v.mT
        grad = grad.to(shift.dtype).add_(shift[..., None]).mul_(weights).to(q.dtype)
        if ctx.alone is not None:
            grad.diagonal(ctx.alone, -2, -1).zero_()
        return grad @ k, grad.mT @ q, weights.mT @ grad_y, None, None, None
