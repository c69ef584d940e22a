"""Attention of every token to every other."""

from torch import Tensor, nn

from revnet.functional import full_attention, rotate
from revnet.nn.attention._heads import check_heads, check_sequence, join_heads, split_heads


class FullAttention(nn.Module):
    """Attention of every token to every other: exact, at a cost that grows with the square of the length.

    The one to begin with. It is the fastest of the three up to some thousand tokens.

    Args:
        dim: Features of a token.
        num_heads: Heads, which share the features.
        is_causal: Whether a token sees itself and what stands before it, and nothing else.

    Shape:
        x: (B, T, dim). mask: (B, T), bool, true where a token is real. rotary: (2, T, dim / num_heads / 2), from
        `rotary_table`. Output: (B, T, dim).

    Raises:
        ValueError: `num_heads` does not divide `dim`. In the forward pass: the shapes do not fit.

    References:
        Vaswani et al. (2017), Attention Is All You Need.
    """

    def __init__(self, dim: int, num_heads: int, *, is_causal: bool = False):
        super().__init__()
        check_heads(dim, num_heads)
        self.dim = dim
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.project = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, rotary: Tensor | None = None) -> Tensor:
        """Compute what each token takes from those it sees."""
        check_sequence(x, self.dim, mask)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return self.project(join_heads(full_attention(q, k, v, is_causal=self.is_causal, mask=mask)))

    def extra_repr(self) -> str:
        """Heads and direction, for `repr`."""
        return f"num_heads={self.num_heads}, is_causal={self.is_causal}"
