"""Attention of every token to every other."""

import torch
import torch.nn.functional as F
from torch import Tensor


def full_attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Softmax of all products of queries and keys: PyTorch's kernels, with the masks of the other attentions.

    The cost grows with the square of the length. Without `mask` the products are never held; with it they are.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        is_causal: Whether a token sees itself and what stands before it, and nothing else.
        mask: Which tokens are real; the others are seen by themselves alone, and their own outputs mean nothing.

    Shape:
        q, k, v: (B, H, T, D); mask: (B, T), bool. Output: (B, H, T, D).

    References:
        Vaswani et al. (2017), Attention Is All You Need, section 3.2.1.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    T = q.shape[-2]
    seen = mask[:, None, None, :]  # (B, 1, 1, T)
    if is_causal:
        seen = seen & torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    # Itself in any case: the softmax over nothing is not a number.
    seen = seen | torch.eye(T, dtype=torch.bool, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
