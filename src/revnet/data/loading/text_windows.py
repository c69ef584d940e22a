"""Batches of windows of a text, as a function of seed and update."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revnet.data.loading._position import Position
from revnet.data.loading._share import Share


class RandomWindows(Iterable[Tensor]):
    """Batches of windows at random positions of a text, (B, length + 1), int64: inputs and, one later, targets.

    The positions are a function of only `seed` and the update number, and nothing is drawn from PyTorch's global
    generator. A run that is resumed after any update therefore sees the same windows as an uninterrupted run, on any
    number of processes. Lightning sets the epoch by `sampler.set_epoch`, and keeps the state in checkpoints.

    Args:
        tokens: The text, (N,).
        length: Tokens of an input.
        batch_size: Windows per batch of all processes together.
        num_batches: Number of these batches per epoch.
        seed: Seed of the positions.
        rank: Number of this process, from 0. It takes the slice of that number of every batch.
        num_processes: Number of processes that divide each batch into equal slices.
        num_parts: Number of consecutive batches to cut a process's slice into, to accumulate their gradients.
        pin_memory: Whether to put batches into page-locked memory, for faster copies to a GPU.

    Raises:
        ValueError: A number is out of range, a batch cannot be divided into equal parts, or the text is shorter than
            `length + 1`.
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
        rank: int = 0,
        num_processes: int = 1,
        num_parts: int = 1,
        pin_memory: bool = False,
    ) -> None:
        _check_counts(length=length, batch_size=batch_size, num_batches=num_batches)
        _check_length(tokens, length)
        self._share = Share(rank, num_processes, num_parts)
        self._share.check_batch_size(batch_size)
        self._tokens = tokens
        self._length = length
        self._batch_size = batch_size
        self._num_batches = num_batches
        self._seed = seed
        self._pin_memory = pin_memory
        order = {"seed": seed, "batch_size": batch_size, "num_batches": num_batches, "num_tokens": len(tokens)}
        bounds = range(0, (num_batches + 1) * batch_size, batch_size)
        self._position = Position(bounds, num_parts, {**order, "length": length})

    @property
    def sampler(self) -> "RandomWindows":
        """The object whose epoch Lightning sets: the windows themselves."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, initially 0."""
        self._position.set_epoch(epoch)

    def __len__(self) -> int:
        return self._num_batches * self._share.num_parts

    def __iter__(self) -> Iterator[Tensor]:
        for update in range(self._position.begin(), self._num_batches):
            starts = self._starts(self._position.epoch * self._num_batches + update)
            for part in self._share.parts(range(self._batch_size)):
                windows = _cut(self._tokens, starts[part.start : part.stop], self._length)
                self._position.advance()
                yield windows.pin_memory() if self._pin_memory else windows

    def batch(self, update: int) -> Tensor:
        """Return the windows of all processes in one update."""
        return _cut(self._tokens, self._starts(update), self._length)

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the epoch, and the updates of it whose batches were all handed out.

        A batch counts once it is handed out, so save the position when its update is complete.
        """
        return self._position.save()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a position: the next iteration yields the rest of its epoch, unless another epoch is set first.

        Raises:
            ValueError: The position is from windows with other arguments.
        """
        self._position.load(state_dict)

    def _starts(self, update: int) -> Tensor:
        random = np.random.default_rng((self._seed, update))
        return torch.from_numpy(random.integers(0, len(self._tokens) - self._length, self._batch_size))


class ConsecutiveWindows(Iterable[Tensor]):
    """Batches of consecutive windows, (B, length + 1), int64, in order; a shorter window at the end is left out.

    Several processes divide each batch: no window is left out or read twice, the sizes of the slices differ by at most
    one window, and every process yields the same number of batches, none of them empty.

    Args:
        tokens: The text, (N,).
        length: Tokens of an input. Each token but the first is a target once.
        batch_size: Windows per batch of all processes together; the last batch may be smaller.
        max_windows: Largest number of windows; a longer text is sampled evenly. None for all windows.
        rank: Number of this process, from 0. It takes the slice of that number of every batch.
        num_processes: Number of processes that divide each batch.

    Raises:
        ValueError: A number is out of range, the text is shorter than `length + 1`, or there are fewer windows than
            processes.
    """

    def __init__(
        self,
        tokens: Tensor,
        *,
        length: int,
        batch_size: int,
        max_windows: int | None = None,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        _check_counts(length=length, batch_size=batch_size)
        _check_length(tokens, length)
        num_windows = (len(tokens) - 1) // length
        num_kept = min(num_windows, max_windows or num_windows)
        share = Share(rank, num_processes)
        share.check_num_samples(num_kept, "windows of the text")
        self._starts = length * (torch.arange(num_kept) * num_windows // num_kept)
        self._tokens = tokens
        self._length = length
        batches = share.global_batches(num_kept, batch_size, drop_last=False)
        self._batches = [part for batch in batches for part in share.parts(batch)]

    @property
    def num_windows(self) -> int:
        """Number of windows in all batches of all processes."""
        return len(self._starts)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._batches:
            yield _cut(self._tokens, self._starts[batch.start : batch.stop], self._length)


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
