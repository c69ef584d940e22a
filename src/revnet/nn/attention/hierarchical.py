"""Hierarchical attention, the H-Transformer-1D's."""

from torch import Tensor, nn

from revnet.functional import hierarchical_attention, rotate
from revnet.nn.attention._heads import check_count, check_heads, check_sequence, join_heads, split_heads


class HierarchicalAttention(nn.Module):
    """Attention to near tokens one by one and to far ones in groups, at O(T) for T tokens.

    Every token sees all that it may, the far ones blurred; nothing is random. The weights are those of
    `FullAttention`, and up to `2 * block_size` tokens so is the result. The one for long sequences.

    Args:
        dim: Features of a token.
        num_heads: Heads, which share the features.
        is_causal: Whether a token sees itself and what stands before it, and nothing else.
        block_size: Tokens of a block, even. Those of neighbouring blocks see each other one by one. The cost grows with
            it.

    Shape:
        x: (B, T, dim). mask: (B, T), bool, true where a token is real. rotary: (2, T, dim / num_heads / 2), from
        `rotary_table`. Output: (B, T, dim).

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `block_size` is odd. In the forward pass: the shapes do not
            fit.

    References:
        Zhu, Soricut (2021), H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences.
    """

    def __init__(self, dim: int, num_heads: int, *, is_causal: bool = False, block_size: int = 64):
        super().__init__()
        check_heads(dim, num_heads)
        check_count("block_size", block_size)
        if block_size % 2:
            raise ValueError(
                f"`block_size` (={block_size}) must be even, since a half of each block has been seen on the level "
                f"below; pass {block_size + 1}."
            )
        self.dim = dim
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.block_size = block_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.project = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, rotary: Tensor | None = None) -> Tensor:
        """Compute what each token takes from the others."""
        check_sequence(x, self.dim, mask)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        y = hierarchical_attention(q, k, v, block_size=self.block_size, is_causal=self.is_causal, mask=mask)
        return self.project(join_heads(y))

    def extra_repr(self) -> str:
        """Heads, direction and blocks, for `repr`."""
        return f"num_heads={self.num_heads}, is_causal={self.is_causal}, block_size={self.block_size}"
