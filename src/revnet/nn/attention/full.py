"""Full attention, from every token to every other token."""

from torch import Tensor, nn

from revnet._checks import check_bool, check_count
from revnet.functional import full_attention, rotate
from revnet.nn.attention._heads import check_heads, check_sequence, choose_kv_heads, join_heads, split_queries
from revnet.nn.attention.key_values import AbstractKeyValueCache, check_cache


class FullAttention(nn.Module):
    """Attend from every token to every other token, exactly. The cost grows with the square of the length.

    Start with this attention. It is the fastest of the three up to a few thousand tokens.

    Args:
        dim: Features of a token.
        num_heads: Number of heads, which share the features.
        is_causal: Whether a token sees only itself and earlier tokens.
        num_kv_heads: Number of heads of the keys and values, each of which serves several heads of the queries
            (grouped-query attention). The default is `num_heads`.
        layer_index: Index of the attention in a cache.

    Shape:
        x: (B, T, dim). mask: (B, T), bool, true where a token is real; or integers, the number of the document of each
            token, which sees no other document, and 0 where a token is not real. rotary: (2, T, dim / num_heads / 2),
            from `rotary_table`. Output: (B, T, dim). With a `cache` of P tokens, `x` follows them, and mask is (B, P +
            T).

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, or `num_heads` not of `num_kv_heads`. In the forward pass:
            the shapes do not fit, or `cache` is passed while gradients are enabled or without `is_causal`.
        TypeError: `is_causal` is not a bool. In the forward pass: an argument is not a tensor.

    References:
        Vaswani et al. (2017), Attention Is All You Need.
        Ainslie et al. (2023), GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        is_causal: bool = False,
        num_kv_heads: int | None = None,
        layer_index: int = 0,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        check_bool(is_causal=is_causal)
        check_count("layer_index", layer_index, least=0)
        self.dim = dim
        self.num_heads = num_heads
        self.num_kv_heads = choose_kv_heads(num_heads, num_kv_heads)
        self.is_causal = is_causal
        self.layer_index = layer_index
        self.qkv = nn.Linear(dim, (num_heads + 2 * self.num_kv_heads) * (dim // num_heads), bias=False)
        self.project = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        rotary: Tensor | None = None,
        cache: AbstractKeyValueCache | None = None,
    ) -> Tensor:
        """Compute the output of each token. The keys and values are added to the `cache`, if there is one."""
        if cache is None:
            check_sequence(x, self.dim, self.num_heads, mask, rotary)
        else:
            self._check_with_cache(x, mask, rotary, cache)
        q, k, v = split_queries(self.qkv(x), self.num_heads, self.num_kv_heads)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)
        return self.project(join_heads(full_attention(q, k, v, is_causal=self.is_causal, mask=mask)))

    def _check_with_cache(
        self, x: Tensor, mask: Tensor | None, rotary: Tensor | None, cache: AbstractKeyValueCache
    ) -> None:
        check_cache(cache)
        if not self.is_causal:
            raise ValueError(
                "`cache` must be None if `is_causal` is False, since new tokens change the output of earlier ones."
            )
        # The first attention of a model has added the new tokens already when the next one is called.
        num_new = x.shape[1] if isinstance(x, Tensor) and x.dim() == 3 else 0
        num_cached = mask.shape[1] - num_new if isinstance(mask, Tensor) and mask.dim() == 2 else 0
        check_sequence(x, self.dim, self.num_heads, mask, rotary, num_cached=num_cached)

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        kv_heads = "" if self.num_kv_heads == self.num_heads else f", num_kv_heads={self.num_kv_heads}"
        return f"num_heads={self.num_heads}{kv_heads}, is_causal={self.is_causal}"
