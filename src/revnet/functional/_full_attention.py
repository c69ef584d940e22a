"""Attention of every token to every other."""

from typing import Any

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

    The queries may be the last T tokens of S, and several of their heads may share a head of the keys and values.

    Shape:
        q: (B, H, T, D); k, v: (B, G, S, D), where G divides H; mask: (B, S), bool. Output: (B, H, T, D).

    Raises:
        TypeError: An argument is not of the type in the signature.
        ValueError: A tensor has another number of dimensions, or `mask` has another shape.

    References:
        Vaswani et al. (2017), Attention Is All You Need, section 3.2.1.
    """
    check_per_head(q=q, k=k, v=v)
    check_bool(is_causal=is_causal)
    check_mask(mask, (q.shape[0], k.shape[-2]))
    T, S = q.shape[-2], k.shape[-2]
    options: dict[str, Any] = {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}
    if mask is None and (T == S or not is_causal):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, **options)
    if mask is None and T == 1:  # The last token sees all.
        return F.scaled_dot_product_attention(q, k, v, **options)
    seen = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, S)
    if is_causal:
        earlier = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        seen = earlier if seen is None else seen & earlier
    if mask is not None:
        assert seen is not None
        # A token always sees itself, since the softmax over no keys is NaN.
        own = torch.eye(T, dtype=torch.bool, device=q.device)
        seen = seen | (own if T == S else F.pad(own, (S - T, 0)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, **options)
