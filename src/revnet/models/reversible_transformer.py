"""Reversible transformers for sequences of tokens: language models and encoders.

Embedded tokens enter two residual streams; attention adds to one what it reads in the other, a perceptron the other way
round; at the end the streams are concatenated, normalised and turned into logits. So the Reformer has it, whose
published code is in google/trax. Three attentions can be had: full, by locality-sensitive hashing (Reformer), and
hierarchical (H-Transformer-1D). Positions are rotary: queries and keys turn, nothing is added to the streams.

B T: batch and length of the tokens; D: features of a token in one stream.

References:
    Kitaev, Kaiser, Levskaya (2020), Reformer: The Efficient Transformer.
    Zhu, Soricut (2021), H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences.
    Su et al. (2021), RoFormer: Enhanced Transformer with Rotary Position Embedding.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from revnet.coupling import AbstractCoupling, Additive, FixedPoint
from revnet.functional import chunked, rotary_table
from revnet.models._checks import check_choice, check_positive, check_share
from revnet.nn import AbstractPolicy, Reverse, ReversibleBlock, ReversibleSequential, as_policy
from revnet.nn.attention import FullAttention, HierarchicalAttention, LSHAttention

ATTENTIONS = ("full", "lsh", "hierarchical")
"""What `ReversibleTransformer` takes as `attention`."""
_DEVIATION = 0.02
"""Of initial weights."""


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
        """Compute the residual of `x`."""
        return self.dropout(self.attention(self.norm(x), mask=mask, rotary=rotary))


class FeedForward(nn.Module):
    """The residual function g: layer norm, and a perceptron on each token.

    In chunks, the hidden layer exists for one chunk of the tokens at a time, in the backward pass too, which computes
    it again. The result is the same up to the rounding of matrix products of another size.

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
        """Compute the residual of `x`; where tokens are, or whether they are real, makes no difference."""
        return self.dropout(chunked(self.layers, x, self.num_chunks))

    def extra_repr(self) -> str:
        """The number of chunks, if there are several, for `repr`."""
        return f"num_chunks={self.num_chunks}" if self.num_chunks > 1 else ""


class ReversibleTransformer(nn.Module):
    """A reversible transformer: a language model, or with `is_causal=False` an encoder.

    Args:
        vocab_size: How many tokens there are.
        dim: Features of a token, in each of the two streams; a multiple of `num_heads`, such that a head has an even
            number.
        depth: Number of blocks.
        num_heads: Heads of the attention.
        max_length: The most tokens of a sequence. Nothing is learnt for a position; `generate` looks so far back.
        is_causal: Whether a token sees itself and what stands before it, and nothing else: a decoder. Otherwise each
            sees all: an encoder.
        attention: "full", whose cost grows with the square of the length; "lsh", the Reformer's, among tokens that
            random rotations put into one bucket; "hierarchical", the H-Transformer-1D's, which sees far tokens in
            groups.
        bucket_size: Of LSH attention: how many tokens a bucket has on average.
        num_hashes: Of LSH attention: rounds of hashing.
        block_size: Of hierarchical attention: tokens of a block, even.
        ff_mult: Width of the perceptrons inside, in units of `dim`.
        ff_chunks: In how many chunks of the tokens the perceptrons run, one after the other: a hidden layer that is so
            many times smaller, for one more computation of it in the backward pass.
        dropout: Share of features dropped after the embedding and of each residual.
        coupling: How residuals join the streams. `Additive()` by default; for LSH attention `FixedPoint()`, since a
            token that lies between two buckets must be rebuilt to the last bit to fall into the same one again.
        policy: What to do with the activations of the blocks, `Reverse()` by default. `Store()` makes the stored twin.

    Shape:
        tokens: (B, T), integers. mask: (B, T), bool, true where a token is real. Output: logits, (B, T, vocab_size).

    Numerics:
        Under autocast the streams are float32, in which they can be rebuilt; the residual functions compute in low
        precision. `blocks.inverse` gives the embedded tokens back to 6e-8 after 12 new blocks in float32; on the
        fixed-point grid exactly, once the embedding has been rounded to it, by at most 2^-15.

    Raises:
        TypeError: `policy` or `coupling` is none.
        ValueError: There is no such attention, a count is not positive, `dropout` is not from 0 to below 1, `num_heads`
            does not divide `dim`, or a head has an odd number of features. In the forward pass: `tokens` or `mask` has
            another shape.

    References:
        Kitaev, Kaiser, Levskaya (2020), Reformer: The Efficient Transformer.
    """

    is_reversible = True

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
        check_positive(vocab_size=vocab_size, dim=dim, depth=depth, num_heads=num_heads, max_length=max_length)
        check_positive(ff_chunks=ff_chunks)
        check_share(dropout=dropout)
        check_choice("attention", attention, ATTENTIONS)
        hidden_dim = round(dim * ff_mult)
        if hidden_dim < 1:
            raise ValueError(f"`ff_mult` (={ff_mult}) must be positive; 4 is usual.")
        policy = Reverse() if policy is None else as_policy(policy)
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.is_causal = is_causal
        self.num_features = 2 * dim

        self.embedding = nn.Embedding(vocab_size, dim)
        self.dropout = nn.Dropout(dropout)

        def make_attention() -> nn.Module:
            if attention == "lsh":
                return LSHAttention(dim, num_heads, is_causal=is_causal, bucket_size=bucket_size, num_hashes=num_hashes)
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
        self.head = nn.Linear(2 * dim, vocab_size)
        self._head_dim = dim // num_heads
        rotary_table(1, self._head_dim)  # raises if heads are odd
        self._initialize()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the logits of each token's successor; of an encoder, those of the token itself."""
        return self.head(self.forward_features(tokens, mask))

    def forward_features(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the final features of each token, (B, T, 2 * dim): its embedding in context."""
        x = self.embed(tokens)
        return self.norm(self.blocks(x, mask=mask, rotary=self.rotary(x)))

    def embed(self, tokens: Tensor) -> Tensor:
        """What the blocks read: the embedded tokens, once for each stream, (B, T, 2 * dim)."""
        self._check(tokens)
        # Joined, not as a pair: what the blocks hold for the backward pass is then what the norm reads.
        return self.dropout(self._look_up(tokens)).repeat(1, 1, 2)

    def rotary(self, x: Tensor) -> Tensor:
        """The angles of positions for the attention on `x`, (B, T, 2 * dim); an argument of the blocks."""
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
        """Continue sequences, token by token, in evaluation mode.

        Args:
            tokens: How the sequences begin, (B, T), T at least 1; the last `max_length` are looked at.
            num_new: How many tokens to append.
            temperature: Divides the logits: below 1 safer, above 1 wilder; 0 takes the likeliest token.
            top_k: Draw from so many of the likeliest tokens only.
            top_p: Draw from the likeliest tokens that together have this probability.
            generator: Where randomness comes from; PyTorch's global state by default.

        Returns:
            (B, T + num_new), `tokens` and what follows them.

        Raises:
            ValueError: The model is an encoder, or an argument is out of range.
        """
        self._check_generate(tokens, num_new, temperature, top_k, top_p)
        with _evaluating(self):
            for _ in range(num_new):
                logits = self.head(self.forward_features(tokens[:, -self.max_length :])[:, -1])
                token = _draw(logits.float(), temperature, top_k, top_p, generator)
                tokens = torch.cat((tokens, token.to(tokens.dtype)), dim=1)
        return tokens

    def _look_up(self, tokens: Tensor) -> Tensor:
        try:
            return self.embedding(tokens)
        except IndexError:  # what the CPU says
            raise ValueError(
                f"`tokens` must be from 0 to {self.vocab_size - 1}, but are from {tokens.min()} to {tokens.max()}; "
                "build the model with a larger `vocab_size`."
            ) from None

    def _check(self, tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
            kind = str(tokens.dtype) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"`tokens` (={kind}) must be a tensor of integers; pass `tokens.long()`.")
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(
                f"`tokens` has shape {tuple(tokens.shape)}, but must have (B, T), T at least 1; pass `tokens[None]` "
                "for one sequence."
            )
        if tokens.shape[1] > self.max_length:
            raise ValueError(
                f"`tokens` has {tokens.shape[1]} positions, more than `max_length` (={self.max_length}); build the "
                "model with a larger one, or pass a part."
            )

    def _check_generate(
        self, tokens: Tensor, num_new: int, temperature: float, top_k: int | None, top_p: float | None
    ) -> None:
        self._check(tokens[:, -self.max_length :] if isinstance(tokens, Tensor) and tokens.dim() == 2 else tokens)
        if not self.is_causal:
            raise ValueError("an encoder cannot generate, since its tokens see later ones; pass `is_causal=True`.")
        if isinstance(num_new, bool) or not isinstance(num_new, int) or num_new < 0:
            raise ValueError(f"`num_new` (={num_new!r}) must be a positive integer, or 0.")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"`temperature` (={temperature!r}) must be positive, or 0 for the likeliest token.")
        if top_k is not None:
            check_positive(top_k=top_k)
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"`top_p` (={top_p!r}) must be above 0 and at most 1, which leaves out nothing.")

    def _initialize(self) -> None:
        """Normal with deviation 0.02, smaller where a residual ends by the square root of their number; as in GPT-2."""
        ends = 2 * len(self.blocks)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                is_end = name.endswith(("attention.project", "layers.3"))
                nn.init.normal_(module.weight, std=_DEVIATION / math.sqrt(ends) if is_end else _DEVIATION)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """A token for each row of logits, (B, vocab_size); returns (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    values, order = (logits / temperature).sort(-1, descending=True)
    if top_k is not None:
        values[:, top_k:] = -math.inf
    probabilities = values.softmax(-1)
    if top_p is not None:
        # The token that reaches the sum is in, and so the likeliest one always is.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode; on leaving, each in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def reformer_enwik8(
    *,
    vocab_size: int = 258,
    max_length: int = 65_536,
    ff_chunks: int = 1,
    dropout: float = 0.0,
    policy: AbstractPolicy | str | None = None,
) -> ReversibleTransformer:
    """The Reformer of 12 blocks for the bytes of enwik8, 64k at a time: 139,319,554 parameters.

    Width, depth, heads, perceptrons, chunks of 256 and 4 rounds of hashing are published; positions are rotary here,
    where the Reformer adds learnt ones, and all blocks attend by hashing.
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
    """An H-Transformer-1D decoder of the authors' small size, reversible: 31,017,344 parameters."""
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
    """An H-Transformer-1D decoder of the authors' base size, reversible: 140,189,056 parameters."""
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
    """An H-Transformer-1D decoder of the authors' large size, reversible: 400,944,512 parameters."""
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
