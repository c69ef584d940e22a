"""Transformers of published sizes."""

from revnet.models.reversible_transformer._network import ReversibleTransformer
from revnet.nn import AbstractPolicy


def reformer_enwik8(
    *,
    vocab_size: int = 258,
    max_length: int = 65_536,
    ff_chunks: int = 1,
    dropout: float = 0.0,
    policy: AbstractPolicy | str | None = None,
) -> ReversibleTransformer:
    """Return the Reformer with 12 blocks for sequences of 64k bytes of enwik8: 139,319,554 parameters.

    Width, depth, heads, perceptrons, chunks of 256 and 4 rounds of hashing are the published values. Unlike the
    Reformer, which adds learned positions, this network has rotary positions, and all blocks use hashing.
    """
    return ReversibleTransformer(
        vocab_size=vocab_size,
        dim=1024,
        depth=12,
        num_heads=8,
        max_length=max_length,
        attention="lsh",
        bucket_size=128,
        num_hashes=4,
        ff_chunks=ff_chunks,
        dropout=dropout,
        policy=policy,
    )


def h_transformer_small(
    *,
    vocab_size: int = 32_128,
    max_length: int = 16_384,
    ff_chunks: int = 1,
    dropout: float = 0.0,
    policy: AbstractPolicy | str | None = None,
) -> ReversibleTransformer:
    """Return a reversible H-Transformer-1D decoder of the authors' small size: 31,017,344 parameters."""
    return ReversibleTransformer(
        vocab_size=vocab_size,
        dim=256,
        depth=8,
        num_heads=8,
        max_length=max_length,
        attention="hierarchical",
        block_size=16,
        ff_mult=4,
        ff_chunks=ff_chunks,
        dropout=dropout,
        policy=policy,
    )


def h_transformer_base(
    *,
    vocab_size: int = 32_128,
    max_length: int = 16_384,
    ff_chunks: int = 1,
    dropout: float = 0.0,
    policy: AbstractPolicy | str | None = None,
) -> ReversibleTransformer:
    """Return a reversible H-Transformer-1D decoder of the authors' base size: 140,189,056 parameters."""
    return ReversibleTransformer(
        vocab_size=vocab_size,
        dim=768,
        depth=12,
        num_heads=12,
        max_length=max_length,
        attention="hierarchical",
        block_size=16,
        ff_mult=8 / 3,
        ff_chunks=ff_chunks,
        dropout=dropout,
        policy=policy,
    )


def h_transformer_large(
    *,
    vocab_size: int = 32_128,
    max_length: int = 16_384,
    ff_chunks: int = 1,
    dropout: float = 0.0,
    policy: AbstractPolicy | str | None = None,
) -> ReversibleTransformer:
    """Return a reversible H-Transformer-1D decoder of the authors' large size: 400,944,512 parameters."""
    return ReversibleTransformer(
        vocab_size=vocab_size,
        dim=1024,
        depth=24,
        num_heads=16,
        max_length=max_length,
        attention="hierarchical",
        block_size=16,
        ff_mult=4,
        ff_chunks=ff_chunks,
        dropout=dropout,
        policy=policy,
    )
