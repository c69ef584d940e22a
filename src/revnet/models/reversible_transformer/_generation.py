"""Generation of tokens, with and without a cache of keys and values.

B T: batch and length of the prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from revnet._checks import check_bool, check_generator, check_mask, describe, is_integer
from revnet.models._checks import check_tokens
from revnet.models._sampling import check_sampling, draw_tokens, evaluating
from revnet.models.reversible_transformer._reading import ReadsTokens
from revnet.nn import CrossEntropyHead
from revnet.nn.attention import KeyValueCache

NextLogits = Callable[[Tensor], Tensor]
"""Function from the tokens so far, (B, S), to the logits of the next ones, (B, vocab_size)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Sampling:
    """How tokens are drawn, and when a row ends."""

    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None
    stop_tokens: Sequence[int]

    def continue_tokens(self, tokens: Tensor, num_new: int, next_logits: NextLogits) -> Tensor:
        """Append up to `num_new` tokens to each row. A row that has ended repeats its stop token."""
        stops = torch.tensor(self.stop_tokens, dtype=tokens.dtype, device=tokens.device)
        has_ended = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        for _ in range(num_new):
            logits = next_logits(tokens).float()
            token = draw_tokens(logits, float(self.temperature), self.top_k, self.top_p, self.generator)
            token = token.to(tokens.dtype)
            if self.stop_tokens:
                token = torch.where(has_ended, tokens[:, -1:], token)
                has_ended |= torch.isin(token, stops)
            tokens = torch.cat((tokens, token), dim=1)
            if self.stop_tokens and bool(has_ended.all()):
                break
        return tokens


def make_sampling(
    vocab_size: int,
    num_new: int,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
    stop_tokens: int | Sequence[int],
) -> Sampling:
    """Check the arguments of `generate` that say how to draw tokens, and return them."""
    check_sampling(num_new, temperature, top_k, top_p)
    check_generator(generator)
    stops = [stop_tokens] if is_integer(stop_tokens) else stop_tokens
    if not isinstance(stops, Sequence) or isinstance(stops, str) or not all(map(is_integer, stops)):
        raise TypeError(f"`stop_tokens` (={describe(stop_tokens)}) must be a token or a list of tokens, integers.")
    for stop in stops:
        if not 0 <= stop < vocab_size:
            raise ValueError(
                f"`stop_tokens` (={describe(stop_tokens)}) must be from 0 to {vocab_size - 1}, the tokens of this "
                "model; take them from the tokenizer that the model was trained with."
            )
    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator, stop_tokens=stops)


class GeneratesTokens(ReadsTokens):
    """The part of `ReversibleTransformer` that generates tokens."""

    vocab_size: int
    """Number of different tokens."""
    head: CrossEntropyHead

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        num_new: int,
        *,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        stop_tokens: int | Sequence[int] = (),
        use_cache: bool | None = None,
    ) -> Tensor:
        """Continue sequences token by token, in evaluation mode.

        Full attention keeps the keys and values of the tokens that it has read, so each new token costs about the same.
        The other attentions compute the whole sequence again for each token. So does full attention once a sequence is
        longer than `max_length`: then the tokens that are left have other keys than before.

        Args:
            tokens: Beginnings of the sequences, (B, T) with T at least 1. Only the last `max_length` are used.
            num_new: Number of tokens to append.
            mask: Which tokens are real, (B, T), for prompts of different lengths. Pad the shorter ones on the left.
            temperature: Divisor of the logits. Values below 1 give more predictable text, and values above 1 more
                varied text. 0 always takes the most likely token.
            top_k: Draw only from this number of the most likely tokens.
            top_p: Draw only from the most likely tokens that together have this probability.
            generator: Source of random numbers. The default is PyTorch's random state.
            stop_tokens: A token, or several, after which a sequence ends. It then repeats this token until all
                sequences have ended.
            use_cache: Whether to keep keys and values. By default, they are kept where that is possible.

        Returns:
            The sequences, (B, T + num_new), or shorter if all of them have ended.

        Raises:
            TypeError: `tokens` is not a tensor of integers, `mask` is not a bool tensor, or `generator` is not a
                generator.
            ValueError: The model is an encoder, an argument is out of range, or `mask` has padding on the right. Or
                `use_cache` is True, and the attention has no cache or the sequences exceed `max_length`.
        """
        seen = tokens[:, -self.max_length :] if isinstance(tokens, Tensor) and tokens.dim() == 2 else tokens
        check_tokens(seen, most=self.max_length)
        if not self.is_causal:
            raise ValueError("an encoder cannot generate, since its tokens see later ones; pass `is_causal=True`.")
        sampling = make_sampling(
            self.vocab_size,
            num_new,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            stop_tokens=stop_tokens,
        )
        mask = check_left_padding(mask, tokens)
        num_read = tokens.shape[1] + num_new - 1
        with evaluating(cast("nn.Module", self)):
            return sampling.continue_tokens(tokens, num_new, self._reader(mask, num_read, use_cache))

    def _reader(self, mask: Tensor | None, num_read: int, use_cache: bool | None) -> NextLogits:
        if use_cache is not None:
            check_bool(use_cache=use_cache)
        if use_cache:
            self.check_cacheable()
            if num_read > self.max_length:
                raise ValueError(
                    f"`use_cache` (=True) must be None for {num_read:,} positions, more than `max_length` "
                    f"(={self.max_length:,}), since a cache does not fit a window that moves; or generate less."
                )
        window = _WindowReader(self, mask)
        if use_cache is False or self.options.attention != "full" or num_read < 1:
            return window
        return _CachedReader(self, mask, KeyValueCache(min(num_read, self.max_length)), window)


def check_left_padding(mask: Any, tokens: Tensor) -> Tensor | None:
    """Return `mask`, or None if all tokens are real.

    Raises:
        TypeError: `mask` is not a bool tensor.
        ValueError: It has another shape than `tokens`, or a row does not end with real tokens.
    """
    if mask is None:
        return None
    check_mask(mask, tokens.shape)
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError(
            "`mask` must be false only at the start of a row, since new tokens follow its last one; pad the prompts on "
            "the left."
        )
    return None if bool(mask.all()) else mask


class _WindowReader:
    """Compute the logits from the last `max_length` tokens of each row, all of them again."""

    def __init__(self, model: GeneratesTokens, mask: Tensor | None) -> None:
        self.model = model
        self.num_padding = None if mask is None else (~mask).sum(1)

    def __call__(self, tokens: Tensor) -> Tensor:
        model, total = self.model, tokens.shape[1]
        if self.num_padding is None:
            logits: Tensor = model.head(model.forward_features(tokens[:, -model.max_length :])[:, -1])
            return logits
        # Each row starts with its first real token. What follows its last one does not matter in a causal model.
        lengths = (total - self.num_padding).clamp(max=model.max_length)
        places = torch.arange(int(lengths.max()), device=tokens.device)
        window = tokens.gather(1, (total - lengths[:, None] + places).clamp(max=total - 1))
        features = model.forward_features(window)
        rows = torch.arange(len(tokens), device=tokens.device)
        last: Tensor = model.head(features[rows, lengths - 1])
        return last


class _CachedReader:
    """Compute the logits from the new tokens and the cached keys and values of the earlier ones."""

    def __init__(
        self, model: GeneratesTokens, mask: Tensor | None, cache: KeyValueCache, window: _WindowReader
    ) -> None:
        self.model = model
        self.mask = mask
        self.cache = cache
        self.window = window

    def __call__(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.model.max_length:
            return self.window(tokens)
        new = tokens[:, self.cache.get_seq_length() :]
        mask = self.mask
        if mask is not None:
            added = mask.new_ones(len(mask), tokens.shape[1] - mask.shape[1])
            mask = torch.cat((mask, added), dim=1)
        features = self.model.forward_features(new, mask, cache=self.cache)
        logits: Tensor = self.model.head(features[:, -1])
        return logits
