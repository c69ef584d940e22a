"""Attention by locality-sensitive hashing, the Reformer's."""

import torch
from torch import Tensor, nn

from revnet.functional import lsh_attention, rotate
from revnet.nn.attention._heads import check_count, check_heads, check_sequence, join_heads, split_heads

_SEED = 0
"""Of the rotations in evaluation."""


class LSHAttention(nn.Module):
    """Attention among tokens that random rotations put into the same bucket, at O(T log T) for T tokens.

    Queries and keys are the same vectors, which `FullAttention` tells apart: another model, not another way to compute
    the same. Up to some thousand tokens full attention is faster, and misses nothing.

    In training each call draws rotations from PyTorch's global state; in evaluation they are always the same ones. In a
    reversible block, use `FixedPoint()`: a token whose vector lies between two buckets may change over by the rounding
    of a reconstruction.

    Args:
        dim: Features of a token.
        num_heads: Heads, which share the features.
        is_causal: Whether a token sees what stands before it, and nothing else.
        bucket_size: How many tokens a bucket has on average; in a round a token sees at most four times as many, or
            twice if causal. Up to 1.4 times as many tokens, all are in one bucket.
        num_hashes: Rounds of hashing. More of them miss less, at a cost that grows with them.

    Shape:
        x: (B, T, dim). mask: (B, T), bool, true where a token is real. rotary: (2, T, dim / num_heads / 2), from
        `rotary_table`. Output: (B, T, dim).

    Raises:
        ValueError: `num_heads` does not divide `dim`, or a count is not positive. In the forward pass: the shapes do
            not fit.

    References:
        Kitaev, Kaiser, Levskaya (2020), Reformer: The Efficient Transformer.
    """

    def __init__(
        self, dim: int, num_heads: int, *, is_causal: bool = False, bucket_size: int = 64, num_hashes: int = 4
    ):
        super().__init__()
        check_heads(dim, num_heads)
        check_count("bucket_size", bucket_size)
        check_count("num_hashes", num_hashes)
        self.dim = dim
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.bucket_size = bucket_size
        self.num_hashes = num_hashes
        self.qk = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.project = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, rotary: Tensor | None = None) -> Tensor:
        """Compute what each token takes from those it finds."""
        check_sequence(x, self.dim, mask)
        (qk,) = split_heads(self.qk(x), 1, self.num_heads)
        (v,) = split_heads(self.v(x), 1, self.num_heads)
        if rotary is not None:
            qk = rotate(qk, rotary)
        y = lsh_attention(
            qk,
            v,
            bucket_size=self.bucket_size,
            num_hashes=self.num_hashes,
            is_causal=self.is_causal,
            mask=mask,
            generator=None if self.training else torch.Generator().manual_seed(_SEED),
        )
        return self.project(join_heads(y))

    def extra_repr(self) -> str:
        """Heads, direction and hashing, for `repr`."""
        return (
            f"num_heads={self.num_heads}, is_causal={self.is_causal}, bucket_size={self.bucket_size}, "
            f"num_hashes={self.num_hashes}"
        )
