"""The way of tokens through a transformer, up to the features from which the head computes logits.

B T: batch and length of the tokens; D: features of a token in one stream; P: tokens in a cache.
"""

from typing import Any

import torch
from torch import Tensor, nn

from revnet._checks import check_mask, check_tensor
from revnet._types import Streams
from revnet.functional import rotary_table
from revnet.models._checks import check_tokens
from revnet.models.reversible_transformer._forms import AbstractForm
from revnet.models.reversible_transformer._layer_options import LayerOptions
from revnet.nn.attention.key_values import AbstractKeyValueCache, check_cache


class ReadsTokens:
    """The part of `ReversibleTransformer` that computes features of tokens."""

    options: LayerOptions
    """Options of the layers."""
    max_length: int
    """Largest number of tokens in a sequence."""
    is_causal: bool
    """Whether a token sees only itself and earlier tokens."""
    num_features: int
    """Number of features from which the head computes the logits of a token."""
    training: bool
    """Whether the model is in training mode."""
    embedding: nn.Embedding
    dropout: nn.Module
    norm: nn.Module
    blocks: Any
    _form: AbstractForm

    def forward_features(
        self, tokens: Tensor, mask: Tensor | None = None, *, cache: AbstractKeyValueCache | None = None
    ) -> Tensor:
        """Compute the final features of each token, (B, T, num_features): its embedding in context."""
        if cache is not None:
            self._check_with_cache(tokens, cache)
        x = self.embed(tokens)
        shape = tokens.shape if cache is None else (tokens.shape[0], cache.get_seq_length() + tokens.shape[1])
        check_mask(mask, shape, takes_documents=True)
        return self.run_blocks(x, mask=mask, cache=cache)

    def run_blocks(
        self,
        x: Tensor | Streams,
        *,
        mask: Tensor | None = None,
        rotary: Tensor | None = None,
        cache: AbstractKeyValueCache | None = None,
    ) -> Tensor:
        """Compute the final features of each token from the output of `embed`.

        Args:
            x: Output of `embed` or `enter`.
            mask: Which tokens are real, (B, T), or with a cache (B, P + T).
            rotary: Rotary table; None for tokens at consecutive positions.
            cache: Keys and values of earlier tokens.
        """
        check_cache(cache)
        if cache is None:
            y = self.blocks(x, mask=mask, rotary=self.rotary(x) if rotary is None else rotary)
        else:
            rotary = self.rotary(x, start=cache.get_seq_length()) if rotary is None else rotary
            y = self.blocks(x, mask=mask, rotary=rotary, cache=cache)
        features: Tensor = self.norm(self._form.leave(y, len(self.blocks)))
        return features

    def embed(self, tokens: Tensor) -> Any:
        """Compute the input of the blocks.

        It holds the embedded tokens once for each stream, (B, T, 2 * dim), in the coupled form; a pair of streams in
        the midpoint and the leapfrog form; and the embedded tokens, (B, T, dim), in the stored form.
        """
        check_tokens(tokens, most=self.max_length)
        return self.enter(look_up(self.embedding, tokens))

    def enter(self, x: Tensor) -> Any:
        """Compute the input of the blocks from the embedded tokens, (B, T, dim)."""
        check_tensor("x", x, hint="pass the embedded tokens")
        if x.dim() != 3 or x.shape[-1] != self.options.dim:
            raise ValueError(f"`x` has shape {tuple(x.shape)}, but must have (B, T, {self.options.dim}).")
        return self._form.enter(self.dropout(x))

    def rotary(self, x: Tensor | Streams, *, start: int = 0) -> Tensor:
        """Return the rotary table for the attention on the output of `embed`. It is an argument of the blocks.

        Args:
            x: Output of `embed`.
            start: Position of the first token.
        """
        stream: Any = x[0] if isinstance(x, tuple) and x else x
        check_tensor("x", stream, hint="pass the output of `embed`")
        if stream.dim() != 3:
            raise ValueError(f"`x` has shape {tuple(stream.shape)}, but must have (B, T, {self.num_features}).")
        dtype = torch.float64 if stream.dtype == torch.float64 else torch.float32
        options = self.options
        return rotary_table(
            stream.shape[1],
            options.head_dim,
            start=start,
            base=options.rope_theta,
            device=stream.device,
            dtype=dtype,
        )

    def check_cacheable(self) -> None:
        """Raise unless the attention can keep keys and values.

        Raises:
            ValueError: The model is an encoder, or its attention is not full.
        """
        if self.options.attention != "full":
            raise ValueError(
                f"`attention` (={self.options.attention!r}) has no cache of keys and values; leave `use_cache` and "
                "`cache` out, or build the model with `attention='full'`."
            )
        if not self.is_causal:
            raise ValueError(
                "an encoder has no cache, since new tokens would change the output of earlier ones; pass "
                "`is_causal=True`."
            )

    def _check_with_cache(self, tokens: Tensor, cache: AbstractKeyValueCache) -> None:
        check_cache(cache)
        self.check_cacheable()
        if self.training:
            raise ValueError(
                "`cache` must be None in training mode, in which dropout differs in each call; call `model.eval()`."
            )
        check_tokens(tokens, most=self.max_length)
        length = cache.get_seq_length() + tokens.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"`tokens` make a sequence of {length} positions with the ones in the `cache`, more than `max_length` "
                f"(={self.max_length}); build the model with a larger value, or pass shorter sequences."
            )


def look_up(embedding: nn.Embedding, tokens: Tensor, name: str = "tokens") -> Tensor:
    """Return the embedded tokens.

    Raises:
        ValueError: On the CPU, a token is not in the vocabulary.
    """
    try:
        embedded: Tensor = embedding(tokens)
    except IndexError:  # raised on the CPU
        raise ValueError(
            f"`{name}` must be from 0 to {embedding.num_embeddings - 1}, but range from {tokens.min()} to "
            f"{tokens.max()}; build the model with a larger `vocab_size`."
        ) from None
    return embedded
