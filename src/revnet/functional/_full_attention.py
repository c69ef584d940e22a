"""Attention of every token to every other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from revnet._checks import check_bool, check_mask, check_per_head


def full_attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Compute the attention of every token to every other token with PyTorch's kernels.

    The cost grows with the square of the length. The products of queries and keys are stored only if there is a `mask`.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        is_causal: Whether a token sees only itself and earlier tokens.
        mask: Which tokens are real. A token that is not real is seen only by itself, and its output is meaningless.
            Integers are the numbers of documents, and 0 where a token is not real: a token sees only its own document.

    Shape:
        q, k, v: (B, H, T, D); mask: (B, T), bool or integers. Output: (B, H, T, D).

    Raises:
        TypeError: An argument is not of the type in the signature.
        ValueError: A tensor has another number of dimensions, or `mask` has another shape.

    References:
        Vaswani et al. (2017), Attention Is All You Need, section 3.2.1.
    """
    check_per_head(q=q, k=k, v=v)
    check_bool(is_causal=is_causal)
    check_mask(mask, (q.shape[0], q.shape[-2]), takes_documents=True)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    T = q.shape[-2]
    seen = mask[:, None, None, :].bool()  # (B, 1, 1, T)
    if mask.dtype != torch.bool:
        seen = seen & (mask[:, None, :, None] == mask[:, None, None, :])
    if is_causal:
        seen = seen & torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    # A token always sees itself, since the softmax over no keys is NaN.
    seen = seen | torch.eye(T, dtype=torch.bool, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
