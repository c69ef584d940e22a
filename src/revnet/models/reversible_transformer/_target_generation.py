"""Generation of targets by an encoder and a decoder.

B: batch; S: length of the source.
"""

import abc
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from revnet._checks import check_bool, check_count
from revnet.models._sampling import evaluating
from revnet.models.reversible_transformer._generation import make_sampling
from revnet.nn import CrossEntropyHead
from revnet.nn.attention import KeyValueCache
from revnet.nn.attention.key_values import AbstractKeyValueCache


class GeneratesTargets(abc.ABC):
    """The part of `ReversibleEncoderDecoder` that generates tokens."""

    vocab_size: int
    """Number of different tokens."""
    max_length: int
    """Largest number of tokens in a source or target."""
    head: CrossEntropyHead

    @abc.abstractmethod
    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Compute the output of the encoder."""

    @abc.abstractmethod
    def decode(
        self,
        tokens: Tensor,
        context: Tensor,
        source_mask: Tensor | None = None,
        *,
        cache: AbstractKeyValueCache | None = None,
    ) -> Tensor:
        """Compute the final features of the target."""

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        num_new: int,
        *,
        start: int,
        source_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        stop_tokens: int | Sequence[int] = (),
        use_cache: bool = True,
    ) -> Tensor:
        """Generate a target for each source, token by token, in evaluation mode.

        Args:
            source: The sources, (B, S).
            num_new: Largest number of tokens to generate, at most `max_length`.
            start: Token with which every target starts.
            source_mask: Which tokens of the sources are real, (B, S).
            temperature: As in `ReversibleTransformer.generate`.
            top_k: As in `ReversibleTransformer.generate`.
            top_p: As in `ReversibleTransformer.generate`.
            generator: As in `ReversibleTransformer.generate`.
            stop_tokens: As in `ReversibleTransformer.generate`.
            use_cache: Whether to keep keys and values, so that each new token costs about the same.

        Returns:
            The targets, with the start token, (B, 1 + num_new), or shorter if all of them have ended.

        Raises:
            TypeError: An argument has another type.
            ValueError: An argument is out of range.
        """
        sampling = make_sampling(
            self.vocab_size,
            num_new,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            stop_tokens=stop_tokens,
        )
        check_bool(use_cache=use_cache)
        check_count("num_new", num_new, least=0, most=self.max_length, hint="it is the `max_length` of the model")
        check_count("start", start, least=0, most=self.vocab_size - 1, hint="pass a token of the vocabulary")
        with evaluating(cast("nn.Module", self)):
            context = self.encode(source, source_mask)
            cache = KeyValueCache(max(1, num_new)) if use_cache else None

            def next_logits(tokens: Tensor) -> Tensor:
                new = tokens if cache is None else tokens[:, cache.get_seq_length() :]
                logits: Tensor = self.head(self.decode(new, context, source_mask, cache=cache)[:, -1])
                return logits

            tokens = torch.full((len(source), 1), start, dtype=source.dtype, device=source.device)
            return sampling.continue_tokens(tokens, num_new, next_logits)
