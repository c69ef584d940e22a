"""Attention by locality-sensitive hashing, as in the Reformer."""

import torch
from torch import Tensor, nn

from revnet._checks import MOST_LAYERS, check_bool, check_count
from revnet.functional import lsh_attention, rotate
from revnet.nn.attention._heads import check_heads, check_sequence, join_heads, split_heads

_SEED = 0
"""Seed of the rotations in evaluation mode."""


class LSHAttention(nn.Module):
    """Attend among tokens that random rotations put into the same bucket, at O(T log T) cost for T tokens.

    Queries and keys are the same vectors, unlike in `FullAttention`, so this is another model and not another way to
    compute the same one. Up to a few thousand tokens, full attention is faster and misses nothing.

    In training mode each call draws rotations from PyTorch's global random state. In evaluation mode they are always
    the same. In a reversible block, use `FixedPoint()`: a token whose vector lies between two buckets may move to the
    other one because of the rounding of a reconstruction.

    Args:
        dim: Features of a token.
        num_heads: Number of heads, which share the features.
        is_causal: Whether a token sees only earlier tokens.
        bucket_size: Average number of tokens per bucket. In a round a token sees at most four times this number, or
            twice this number if causal. If `max_length` is at most 1.4 times this number, all tokens are in one bucket.
        num_hashes: Number of hashing rounds. More rounds miss less, at a cost that grows with their number.
        max_length: Number of tokens that the number of buckets is chosen for. The default is the number of tokens in
            the batch; the first tokens of a sequence then have another output in a shorter or longer batch.

    Shape:
        x: (B, T, dim). mask: (B, T), bool, true where a token is real. rotary: (2, T, dim / num_heads / 2), from
        `rotary_table`. Output: (B, T, dim).

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, or a count is not positive. In the forward pass: the shapes
            do not fit.
        TypeError: `is_causal` is not a bool. In the forward pass: an argument is not a tensor.

    References:
        Kitaev, Kaiser, Levskaya (2020), Reformer: The Efficient Transformer.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        is_causal: bool = False,
        bucket_size: int = 64,
        num_hashes: int = 4,
        max_length: int | None = None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        check_bool(is_causal=is_causal)
        check_count("bucket_size", bucket_size)
        check_count("num_hashes", num_hashes, most=MOST_LAYERS)
        if max_length is not None:
            check_count("max_length", max_length)
        self.dim = dim
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.bucket_size = bucket_size
        self.num_hashes = num_hashes
        self.max_length = max_length
        self.qk = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.project = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, rotary: Tensor | None = None) -> Tensor:
        """Compute the output of each token."""
        check_sequence(x, self.dim, self.num_heads, mask, rotary)
        (qk,) = split_heads(self.qk(x), 1, self.num_heads)
        (v,) = split_heads(self.v(x), 1, self.num_heads)
        if rotary is not None:
            qk = rotate(qk, rotary)
        y = lsh_attention(
            qk,
            v,
            bucket_size=self.bucket_size,
            num_hashes=self.num_hashes,
            max_length=self.max_length,
            is_causal=self.is_causal,
            mask=mask,
            generator=None if self.training else torch.Generator().manual_seed(_SEED),
        )
        return self.project(join_heads(y))

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        length = "" if self.max_length is None else f", max_length={self.max_length}"
        return (
            f"num_heads={self.num_heads}, is_causal={self.is_causal}, bucket_size={self.bucket_size}, "
            f"num_hashes={self.num_hashes}{length}"
        )
