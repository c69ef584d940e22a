"""Hierarchical attention, as in H-Transformer-1D."""

from torch import Tensor, nn

from revnet._checks import check_block_size, check_bool
from revnet.functional import hierarchical_attention, rotate
from revnet.nn.attention._heads import check_heads, check_sequence, choose_kv_heads, join_heads, split_queries


class HierarchicalAttention(nn.Module):
    """Attend to near tokens one by one and to far tokens in groups, at O(T) cost for T tokens.

    Every token sees all tokens that it may see, the far ones blurred. Nothing is random. The parameters are the same as
    in `FullAttention`, and so is the result for up to `2 * block_size` tokens. Use this attention for long sequences.

    Args:
        dim: Features of a token.
        num_heads: Number of heads, which share the features.
        is_causal: Whether a token sees only itself and earlier tokens.
        block_size: Tokens per block, an even number. Tokens of neighboring blocks see each other one by one. The cost
            grows with it.
        num_kv_heads: Number of heads of the keys and values, as in `FullAttention`. They are repeated for the heads of
            the queries, so this saves parameters and not memory.

    Shape:
        x: (B, T, dim). mask: (B, T), bool, true where a token is real. rotary: (2, T, dim / num_heads / 2), from
        `rotary_table`. Output: (B, T, dim).

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, `num_heads` not of `num_kv_heads`, or `block_size` is odd.
            In the forward pass: the shapes do not fit.
        TypeError: `is_causal` is not a bool. In the forward pass: an argument is not a tensor.

    References:
        Zhu, Soricut (2021), H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        is_causal: bool = False,
        block_size: int = 64,
        num_kv_heads: int | None = None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        check_bool(is_causal=is_causal)
        check_block_size(block_size)
        self.dim = dim
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.block_size = block_size
        self.num_kv_heads = choose_kv_heads(num_heads, num_kv_heads)
        self.qkv = nn.Linear(dim, (num_heads + 2 * self.num_kv_heads) * (dim // num_heads), bias=False)
        self.project = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, rotary: Tensor | None = None) -> Tensor:
        """Compute the output of each token."""
        check_sequence(x, self.dim, self.num_heads, mask, rotary)
        q, k, v = split_queries(self.qkv(x), self.num_heads, self.num_kv_heads)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if self.num_kv_heads != self.num_heads:
            k, v = [each.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for each in (k, v)]
        y = hierarchical_attention(q, k, v, block_size=self.block_size, is_causal=self.is_causal, mask=mask)
        return self.project(join_heads(y))

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        kv_heads = "" if self.num_kv_heads == self.num_heads else f", num_kv_heads={self.num_kv_heads}"
        return f"num_heads={self.num_heads}{kv_heads}, is_causal={self.is_causal}, block_size={self.block_size}"
