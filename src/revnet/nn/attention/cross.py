"""Attention from the tokens of one sequence to another sequence."""

import torch.nn.functional as F
from torch import Tensor, nn

from revnet._checks import MOST_CHANNELS, check_count, check_mask, check_tensor
from revnet.nn.attention._heads import check_heads, choose_kv_heads, join_heads, split_heads
from revnet.nn.attention.key_values import AbstractKeyValueCache, KeyValueCache, check_cache


class CrossAttention(nn.Module):
    """Attend from every token of a sequence to every token of another one, such as the output of an encoder.

    Args:
        dim: Features of a token.
        num_heads: Number of heads, which share the features.
        context_dim: Features of a token of the other sequence; None for `dim`.
        num_kv_heads: Number of heads of the keys and values; None for `num_heads`.
        layer_index: Index of the attention in a cache.

    Shape:
        x: (B, T, dim). context: (B, S, context_dim). mask: (B, S), bool, true where a token of the context is real. A
        row without any real token gets zeros from the attention. Output: (B, T, dim).

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, or `num_heads` not of `num_kv_heads`. In the forward pass:
            the shapes do not fit, or `cache` is passed while gradients are enabled.
        TypeError: In the forward pass: an argument is not a tensor.

    References:
        Vaswani et al. (2017), Attention Is All You Need.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        num_kv_heads: int | None = None,
        layer_index: int = 0,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        context_dim = dim if context_dim is None else context_dim
        check_count("context_dim", context_dim, most=MOST_CHANNELS)
        check_count("layer_index", layer_index, least=0)
        self.dim = dim
        self.num_heads = num_heads
        self.context_dim = context_dim
        self.num_kv_heads = choose_kv_heads(num_heads, num_kv_heads)
        self.layer_index = layer_index
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * self.num_kv_heads * (dim // num_heads), bias=False)
        self.project = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        mask: Tensor | None = None,
        cache: AbstractKeyValueCache | None = None,
    ) -> Tensor:
        """Compute the output of each token. A `KeyValueCache` computes the keys and values of `context` only once."""
        check_tensor("x", x)
        check_tensor("context", context)
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"`x` has shape {tuple(x.shape)}, but must have (B, T, {self.dim}).")
        if context.dim() != 3 or context.shape[0] != x.shape[0] or context.shape[-1] != self.context_dim:
            raise ValueError(
                f"`context` has shape {tuple(context.shape)}, but must have ({x.shape[0]}, S, {self.context_dim})."
            )
        check_mask(mask, context.shape[:2])
        check_cache(cache)
        (q,) = split_heads(self.q(x), 1, self.num_heads)
        if isinstance(cache, KeyValueCache):
            k, v = cache.of_context(self.layer_index, lambda: self._keys_and_values(context))
            if (k.shape[0], k.shape[2]) != context.shape[:2]:
                raise ValueError(
                    f"`context` has shape {tuple(context.shape)}, but the cache is for another one, of ({k.shape[0]}, "
                    f"{k.shape[2]}, {self.context_dim}); make a cache for each context."
                )
        else:
            k, v = self._keys_and_values(context)
        seen = None if mask is None else mask[:, None, None, :]
        options = {} if self.num_kv_heads == self.num_heads else {"enable_gqa": True}
        return self.project(join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, **options)))

    def _keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        k, v = split_heads(self.kv(context), 2, self.num_kv_heads)
        return k, v

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        options = f"num_heads={self.num_heads}"
        return options if self.num_kv_heads == self.num_heads else f"{options}, num_kv_heads={self.num_kv_heads}"
