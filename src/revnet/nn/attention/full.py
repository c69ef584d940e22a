"""Full attention, from every token to every other token."""

from torch import Tensor, nn

from revnet._checks import check_bool
from revnet.functional import full_attention, rotate
from revnet.nn.attention._heads import check_heads, check_sequence, join_heads, split_heads


class FullAttention(nn.Module):
    """Attend from every token to every other token, exactly. The cost grows with the square of the length.

    Start with this attention. It is the fastest of the three up to a few thousand tokens.

    Args:
        dim: Features of a token.
        num_heads: Number of heads, which share the features.
        is_causal: Whether a token sees only itself and earlier tokens.

    Shape:
        x: (B, T, dim). mask: (B, T), bool, true where a token is real; or integers, the number of the document of each
            token, which sees no other document, and 0 where a token is not real. rotary: (2, T, dim / num_heads / 2),
            from `rotary_table`. Output: (B, T, dim).

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`. In the forward pass: the shapes do not fit.
        TypeError: `is_causal` is not a bool. In the forward pass: an argument is not a tensor.

    References:
        Vaswani et al. (2017), Attention Is All You Need.
    """

    def __init__(self, dim: int, num_heads: int, *, is_causal: bool = False):
        super().__init__()
        check_heads(dim, num_heads)
        check_bool(is_causal=is_causal)
        self.dim = dim
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.project = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, rotary: Tensor | None = None) -> Tensor:
        """Compute the output of each token."""
        check_sequence(x, self.dim, self.num_heads, mask, rotary)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return self.project(join_heads(full_attention(q, k, v, is_causal=self.is_causal, mask=mask)))

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        return f"num_heads={self.num_heads}, is_causal={self.is_causal}"
