"""Batches of windows of a text, as a function of seed and update."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor


class RandomWindows(Iterable[Tensor]):
    """Batches of windows at random positions of a text, (B, length + 1), int64: inputs and, one later, targets.

    The positions are a function of `seed` and the update number alone. A run that is resumed therefore sees the same
    windows as an uninterrupted run, and nothing is drawn from PyTorch's global generator.

    Args:
        tokens: The text, (N,).
        length: Tokens of an input.
        batch_size: Windows per batch.
        num_batches: Batches per epoch. Lightning sets the epoch by `sampler.set_epoch`.
        seed: Seed of the positions.
        pin_memory: Whether to put batches into page-locked memory, for faster copies to a GPU.

    Raises:
        ValueError: A count is not positive, or the text is shorter than `length + 1`.
    """

    batch_sampler = None  # Lightning looks for this too where there is a `sampler`

    def __init__(
        self,
        tokens: Tensor,
        *,
        length: int,
        batch_size: int,
        num_batches: int,
        seed: int,
        pin_memory: bool = False,
    ) -> None:
        _check_counts(length=length, batch_size=batch_size, num_batches=num_batches)
        _check_length(tokens, length)
        self._tokens = tokens
        self._length = length
        self._batch_size = batch_size
        self._num_batches = num_batches
        self._seed = seed
        self._pin_memory = pin_memory
        self._epoch = 0

    @property
    def sampler(self) -> "RandomWindows":
        """The object whose epoch Lightning sets: the windows themselves."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, initially 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Tensor]:
        for batch in range(self._num_batches):
            yield self.batch(self._epoch * self._num_batches + batch)

    def batch(self, update: int) -> Tensor:
        """Return the windows of one update."""
        random = np.random.default_rng((self._seed, update))
        starts = torch.from_numpy(random.integers(0, len(self._tokens) - self._length, self._batch_size))
        windows = _cut(self._tokens, starts, self._length)
        return windows.pin_memory() if self._pin_memory else windows


class ConsecutiveWindows(Iterable[Tensor]):
    """Batches of consecutive windows, (B, length + 1), int64, in order; a shorter window at the end is left out.

    Args:
        tokens: The text, (N,).
        length: Tokens of an input. Each token but the first is a target once.
        batch_size: Windows per batch; the last batch may be smaller.
        max_windows: Largest number of windows; a longer text is sampled evenly. None for all windows.

    Raises:
        ValueError: A count is not positive, or the text is shorter than `length + 1`.
    """

    def __init__(self, tokens: Tensor, *, length: int, batch_size: int, max_windows: int | None = None) -> None:
        _check_counts(length=length, batch_size=batch_size)
        _check_length(tokens, length)
        num_windows = (len(tokens) - 1) // length
        num_kept = min(num_windows, max_windows or num_windows)
        self._starts = length * (torch.arange(num_kept) * num_windows // num_kept)
        self._tokens = tokens
        self._length = length
        self._batch_size = batch_size

    @property
    def num_windows(self) -> int:
        """Number of windows in all batches."""
        return len(self._starts)

    def __len__(self) -> int:
        return -(-len(self._starts) // self._batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for starts in self._starts.split(self._batch_size):
            yield _cut(self._tokens, starts, self._length)


def _cut(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    return tokens[starts[:, None] + torch.arange(length + 1)].long()  # (B, length + 1)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` (={count}) must be positive.")


def _check_length(tokens: Tensor, length: int) -> None:
    if len(tokens) <= length:
        raise ValueError(
            f"`length` (={length}) must be less than the {len(tokens)} characters of each part of the text; pass a "
            "smaller length, or a longer text."
        )
