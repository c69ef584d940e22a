"""Reversible transformers for sequences of tokens: language models and encoders.

Embedded tokens enter two residual streams. Attention reads the second stream and adds to the first, and a perceptron
reads the first and adds to the second. At the end the streams are concatenated, normalized and mapped to logits. This
is the structure of the Reformer, whose published code is in google/trax. There are three kinds of attention: full,
locality-sensitive hashing (Reformer) and hierarchical (H-Transformer-1D). Positions are rotary: they rotate queries and
keys, and are not added to the streams.

B T: batch and length of the tokens; D: features of a token in one stream.

References:
    Kitaev, Kaiser, Levskaya (2020), Reformer: The Efficient Transformer.
    Zhu, Soricut (2021), H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences.
    Su et al. (2021), RoFormer: Enhanced Transformer with Rotary Position Embedding.
"""

import math

import torch
from torch import Tensor, nn

from revnet._checks import (
    MOST_CHANNELS,
    MOST_LAYERS,
    check_block_size,
    check_bool,
    check_choice,
    check_count,
    check_counts,
    check_generator,
    check_mask,
    check_share,
    check_tensor,
)
from revnet.coupling import AbstractCoupling, Additive, FixedPoint
from revnet.functional import rotary_table
from revnet.functional._chunked import chunked
from revnet.models._checks import check_heads, check_ratio, check_tokens
from revnet.models._sampling import check_sampling, draw_tokens, evaluating
from revnet.models.pretrained.mixin import HubMixin
from revnet.nn import (
    AbstractPolicy,
    CrossEntropyHead,
    HasGradientCheckpointing,
    Reverse,
    ReversibleBlock,
    ReversibleSequential,
)
from revnet.nn.attention import FullAttention, HierarchicalAttention, LSHAttention
from revnet.nn.policies._has_policies import as_policy

ATTENTIONS = ("full", "lsh", "hierarchical")
"""Values of `attention` in `ReversibleTransformer`."""
_DEVIATION = 0.02
"""Standard deviation of the initial weights."""


class AttentionResidual(nn.Module):
    """The residual function f: layer norm and attention.

    Shape:
        x: (B, T, D). Output: the same.
    """

    def __init__(self, dim: int, attention: nn.Module, *, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = attention
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, rotary: Tensor | None = None) -> Tensor:
        """Return the residual of `x`."""
        return self.dropout(self.attention(self.norm(x), mask=mask, rotary=rotary))


class FeedForward(nn.Module):
    """The residual function g: layer norm and a perceptron on each token.

    With several chunks, the hidden layer exists for one chunk of tokens at a time, also in the backward pass, which
    computes it again. The result is the same up to the rounding of matrix products of a different size.

    Shape:
        x: (B, T, D). Output: the same.
    """

    def __init__(self, dim: int, hidden_dim: int, *, num_chunks: int = 1, dropout: float = 0.0):
        super().__init__()
        self.num_chunks = num_chunks
        self.layers = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, rotary: Tensor | None = None) -> Tensor:
        """Return the residual of `x`. It does not depend on `mask` and `rotary`."""
        return self.dropout(chunked(self.layers, x, self.num_chunks))

    def extra_repr(self) -> str:
        """Return the number of chunks for `repr`, if there are several."""
        return f"num_chunks={self.num_chunks}" if self.num_chunks > 1 else ""


class ReversibleTransformer(HasGradientCheckpointing, HubMixin):
    """A reversible transformer: a language model, or with `is_causal=False` an encoder.

    Args:
        vocab_size: Number of different tokens.
        dim: Features of a token in each of the two streams. It is a multiple of `num_heads`, and each head has an even
            number of features.
        depth: Number of blocks.
        num_heads: Number of attention heads.
        max_length: Largest number of tokens in a sequence, and the number of tokens that `generate` looks back. No
            parameter depends on it. LSH attention has buckets for this number.
        is_causal: Whether a token sees only itself and earlier tokens, as in a decoder, or all, as in an encoder.
        attention: "full" has a cost that grows with the square of the length. "lsh", as in the Reformer, attends among
            tokens that random rotations put into one bucket. "hierarchical", as in H-Transformer-1D, sees far tokens in
            groups.
        bucket_size: Average number of tokens per bucket in LSH attention, in a sequence of `max_length`.
        num_hashes: Number of hashing rounds in LSH attention.
        block_size: Tokens per block in hierarchical attention, an even number.
        ff_mult: Hidden width of the perceptrons, as a multiple of `dim`.
        ff_chunks: Number of chunks of tokens on which the perceptrons run one after the other. The hidden layer gets
            smaller by this factor, and is computed once more in the backward pass.
        dropout: Share of features dropped after the embedding and from each residual.
        coupling: How residuals are combined with the streams. The default is `Additive()`, and for LSH attention
            `FixedPoint()`: a token that lies between two buckets must be rebuilt to the last bit, so that it falls into
            the same bucket again.
        policy: Policy for the activations of the blocks, or its name. The default is `Reverse()`. `Store()` makes the
            stored twin.

    Shape:
        tokens: (B, T), integers. mask: (B, T), true where a token is real, or as in `FullAttention`.
            targets: (B, T), -100 where nothing is to be predicted. Output: logits, (B, T, vocab_size), or a loss, ().

    Numerics:
        Under autocast the streams stay in float32, so that they can be rebuilt, and the residual functions compute in
        low precision. In float32, `blocks.inverse` restores the embedded tokens to 6e-8 after 12 new blocks. On the
        fixed-point grid it restores them exactly, once the embedding has been rounded to the grid by at most 2^-15.

    Raises:
        TypeError: `policy` is not a policy, `coupling` is not a coupling, or `is_causal` is not a bool. In the forward
            pass: `tokens` or `mask` has another type.
        ValueError: No attention or policy has this name, a count is not positive, `dropout` is not from 0 to below 1,
            `dim` is not a multiple of `num_heads`, or a head has an odd number of features. In the forward pass:
            `tokens`, `mask` or `targets` has another shape.

    References:
        Kitaev, Kaiser, Levskaya (2020), Reformer: The Efficient Transformer.
    """

    is_reversible = True
    _card_task = "text"

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        max_length: int = 1024,
        is_causal: bool = True,
        attention: str = "full",
        bucket_size: int = 64,
        num_hashes: int = 4,
        block_size: int = 64,
        ff_mult: float = 4.0,
        ff_chunks: int = 1,
        dropout: float = 0.0,
        coupling: AbstractCoupling | None = None,
        policy: AbstractPolicy | str | None = None,
    ):
        super().__init__()
        check_counts(vocab_size=vocab_size, max_length=max_length, ff_chunks=ff_chunks)
        check_counts(bucket_size=bucket_size, num_hashes=num_hashes)
        check_counts(dim=dim, num_heads=num_heads, most=MOST_CHANNELS)
        check_count("depth", depth, most=MOST_LAYERS)
        check_block_size(block_size)
        check_bool(is_causal=is_causal)
        check_share(dropout=dropout)
        check_choice("attention", attention, ATTENTIONS)
        check_ratio("ff_mult", ff_mult, dim)
        check_heads(dim, num_heads)
        hidden_dim = round(dim * ff_mult)
        policy = Reverse() if policy is None else as_policy(policy)
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.is_causal = is_causal
        self.num_features = 2 * dim

        self.embedding = nn.Embedding(vocab_size, dim)
        self.dropout = nn.Dropout(dropout)

        def make_attention() -> nn.Module:
            if attention == "lsh":
                return LSHAttention(
                    dim,
                    num_heads,
                    is_causal=is_causal,
                    bucket_size=bucket_size,
                    num_hashes=num_hashes,
                    max_length=max_length,
                )
            if attention == "hierarchical":
                return HierarchicalAttention(dim, num_heads, is_causal=is_causal, block_size=block_size)
            return FullAttention(dim, num_heads, is_causal=is_causal)

        if coupling is None:
            coupling = FixedPoint() if attention == "lsh" else Additive()
        self.blocks = ReversibleSequential(
            *[
                ReversibleBlock(
                    AttentionResidual(dim, make_attention(), dropout=dropout),
                    FeedForward(dim, hidden_dim, num_chunks=ff_chunks, dropout=dropout),
                    split_dim=-1,
                    coupling=coupling,
                )
                for _ in range(depth)
            ],
            policy=policy,
        )
        self.norm = nn.LayerNorm(2 * dim)
        self.head = CrossEntropyHead(2 * dim, vocab_size)
        self._head_dim = dim // num_heads
        rotary_table(1, self._head_dim)  # raises an error if the heads have an odd number of features
        _initialize(self)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, *, targets: Tensor | None = None) -> Tensor:
        """Compute the logits of the next token (in an encoder, of the token itself), or with `targets` their loss."""
        features = self.forward_features(tokens, mask)
        return self.head(features) if targets is None else self.head(features, targets)

    def forward_features(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the final features of each token, (B, T, 2 * dim): its embedding in context."""
        x = self.embed(tokens)
        check_mask(mask, tokens.shape, takes_documents=True)
        return self.norm(self.blocks(x, mask=mask, rotary=self.rotary(x)))

    def embed(self, tokens: Tensor) -> Tensor:
        """Compute the input of the blocks: the embedded tokens, once for each stream, (B, T, 2 * dim)."""
        check_tokens(tokens, most=self.max_length)
        # Concatenated, not a pair, so that the tensor that the blocks store is the one that the norm reads.
        return self.dropout(self._look_up(tokens)).repeat(1, 1, 2)

    def rotary(self, x: Tensor) -> Tensor:
        """Return the rotary table for the attention on `x`, (B, T, 2 * dim). It is an argument of the blocks."""
        check_tensor("x", x, hint="pass the output of `embed`")
        if x.dim() != 3:
            raise ValueError(f"`x` has shape {tuple(x.shape)}, but must have (B, T, {self.num_features}).")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return rotary_table(x.shape[1], self._head_dim, device=x.device, dtype=dtype)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        num_new: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue sequences token by token, in evaluation mode.

        Args:
            tokens: Beginnings of the sequences, (B, T) with T at least 1. Only the last `max_length` are used.
            num_new: Number of tokens to append.
            temperature: Divisor of the logits. Values below 1 give more predictable text, and values above 1 more
                varied text. 0 always takes the most likely token.
            top_k: Draw only from this number of the most likely tokens.
            top_p: Draw only from the most likely tokens that together have this probability.
            generator: Source of random numbers. The default is PyTorch's random state.

        Returns:
            The sequences, (B, T + num_new).

        Raises:
            TypeError: `tokens` is not a tensor of integers, or `generator` is not a generator.
            ValueError: The model is an encoder, or an argument is out of range.
        """
        seen = tokens[:, -self.max_length :] if isinstance(tokens, Tensor) and tokens.dim() == 2 else tokens
        check_tokens(seen, most=self.max_length)
        if not self.is_causal:
            raise ValueError("an encoder cannot generate, since its tokens see later ones; pass `is_causal=True`.")
        check_sampling(num_new, temperature, top_k, top_p)
        check_generator(generator)
        with evaluating(self):
            for _ in range(num_new):
                logits = self.head(self.forward_features(tokens[:, -self.max_length :])[:, -1])
                token = draw_tokens(logits.float(), float(temperature), top_k, top_p, generator)
                tokens = torch.cat((tokens, token.to(tokens.dtype)), dim=1)
        return tokens

    def _look_up(self, tokens: Tensor) -> Tensor:
        try:
            return self.embedding(tokens)
        except IndexError:  # raised on the CPU
            raise ValueError(
                f"`tokens` must be from 0 to {self.vocab_size - 1}, but range from {tokens.min()} to {tokens.max()}; "
                "build the model with a larger `vocab_size`."
            ) from None


def _initialize(model: ReversibleTransformer) -> None:
    """Initialize the weights like GPT-2.

    Normal with standard deviation 0.02. The last layer of each residual divides it by the square root of the number of
    residuals.
    """
    num_residuals = 2 * len(model.blocks)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            is_end = name.endswith(("attention.project", "layers.3"))
            nn.init.normal_(module.weight, std=_DEVIATION / math.sqrt(num_residuals) if is_end else _DEVIATION)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


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
