"""The keys and values of the tokens that a model has read, so that it need not compute them for each new token."""

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revnet._checks import check_count, check_per_head, describe


class AbstractKeyValueCache(abc.ABC):
    """The interface of caches: the part of a cache of transformers that the attentions here call.

    A `transformers.DynamicCache` has these methods too, and can be passed in the same places.
    """

    @abc.abstractmethod
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens, and return the keys and values of all tokens.

        Args:
            key_states: Keys of the new tokens, (B, H, T, D).
            value_states: Values of the new tokens, (B, H, T, D).
            layer_idx: Index of the attention.
        """

    @abc.abstractmethod
    def get_seq_length(self) -> int:
        """Return the number of tokens in the cache."""


class KeyValueCache(AbstractKeyValueCache):
    """A cache of keys and values with room for a fixed number of tokens.

    Each attention of a model has its own entry. Memory is allocated when an attention is first called, for `length`
    tokens at once, so that a new token copies nothing but its own keys and values.

    The cache serves inference only: a model refuses it in training mode, and while gradients are enabled.

    Args:
        length: Largest number of tokens.

    Raises:
        ValueError: `length` is not a positive integer. In `update`: the tokens do not fit.

    Example:
        >>> import torch
        >>> from revnet.models import ReversibleTransformer
        >>> from revnet.nn.attention import KeyValueCache
        >>> model = ReversibleTransformer(vocab_size=9, dim=8, depth=2, num_heads=2)
        >>> tokens, cache = torch.tensor([[1, 2, 3, 4]]), KeyValueCache(length=4)
        >>> with torch.no_grad():
        ...     first = model.eval()(tokens[:, :3], cache=cache)
        ...     last = model(tokens[:, 3:], cache=cache)
        >>> torch.allclose(last, model(tokens)[:, 3:], atol=1e-5)
        True
    """

    def __init__(self, length: int) -> None:
        check_count("length", length)
        self.length = length
        self._keys_and_values: dict[int, tuple[Tensor, Tensor]] = {}
        self._num_tokens: dict[int, int] = {}
        self._contexts: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens, and return the keys and values of all tokens.

        Args:
            key_states: Keys of the new tokens.
            value_states: Values of the new tokens.
            layer_idx: Index of the attention.

        Shape:
            key_states, value_states: (B, H, T, D). Output: (B, H, S, D) twice, for all S tokens.

        Raises:
            TypeError: The keys or values are not tensors.
            ValueError: The tokens do not fit, or they are of another batch or another number of features.
        """
        check_per_head(key_states=key_states, value_states=value_states)
        check_count("layer_idx", layer_idx, least=0)
        if value_states.shape[:3] != key_states.shape[:3]:
            raise ValueError(
                f"`value_states` has shape {tuple(value_states.shape)}, but must have the batch, heads and tokens of "
                f"`key_states`, {tuple(key_states.shape[:3])}."
            )
        start = self._num_tokens.get(layer_idx, 0)
        stop = start + key_states.shape[-2]
        if stop > self.length:
            raise ValueError(
                f"`length` (={self.length}) of the cache is less than the {stop} tokens of the sequence; make a cache "
                "with a larger value."
            )
        if layer_idx not in self._keys_and_values:
            self._keys_and_values[layer_idx] = self._allocate(key_states), self._allocate(value_states)
        keys, values = self._keys_and_values[layer_idx]
        _check_fits("key_states", key_states, keys)
        _check_fits("value_states", value_states, values)
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        self._num_tokens[layer_idx] = stop
        return keys[:, :, :stop], values[:, :, :stop]

    def get_seq_length(self) -> int:
        """Return the number of tokens in the cache."""
        return max(self._num_tokens.values(), default=0)

    def of_context(self, layer_idx: int, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the keys and values of an encoder's output, which stay the same for all new tokens.

        Args:
            layer_idx: Index of the attention.
            compute: Function that computes them; called once.
        """
        if layer_idx not in self._contexts:
            self._contexts[layer_idx] = compute()
        return self._contexts[layer_idx]

    def _allocate(self, like: Tensor) -> Tensor:
        B, H, _, D = like.shape
        return torch.empty(B, H, self.length, D, dtype=like.dtype, device=like.device)


def _check_fits(name: str, states: Tensor, kept: Tensor) -> None:
    """Raise if assigning `states` to a part of `kept` would broadcast them."""
    B, H, _, D = kept.shape
    if (*states.shape[:2], states.shape[3]) != (B, H, D):
        raise ValueError(
            f"`{name}` has shape {tuple(states.shape)}, but the cache is for ({B}, {H}, T, {D}); make a cache for each "
            "batch and model."
        )


def check_cache(cache: Any) -> None:
    """Raise unless `cache` is None, or has the methods of a cache and no gradient is wanted."""
    if cache is None:
        return
    if not (callable(getattr(cache, "update", None)) and callable(getattr(cache, "get_seq_length", None))):
        raise TypeError(f"`cache` (={describe(cache)}) must be a `KeyValueCache`, or None.")
    if torch.is_grad_enabled():
        raise ValueError(
            "`cache` must be None while gradients are enabled, since a backward pass would add its tokens again; call "
            "the model within `torch.no_grad()`."
        )
