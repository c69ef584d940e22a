"""Encoded images that arrive one after the other, and how they are shuffled."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from revnet.data.decoding.image_draw import Draw
from revnet.errors import DataError

BUFFER_SIZE = 1000
"""Encoded images in the shuffle buffer of each worker; about 100 MB for ImageNet."""


class Row(NamedTuple):
    """One image as it is stored."""

    encoded: bytes
    """Content of an image file."""
    label: int | None
    """Class as it is stored."""
    name: str
    """Name of the image in messages."""


class Order(NamedTuple):
    """A random order, different in each epoch."""

    seed: int
    """Seed of the loader."""
    epoch: int
    """Number of the epoch, from 0."""

    def shard_generator(self) -> np.random.Generator:
        """Return the generator that orders the shards: the same in every worker."""
        return Draw(self.seed, self.epoch, 0).generator()

    def row_generator(self, worker: int) -> np.random.Generator:
        """Return the generator that shuffles the rows of one worker."""
        return Draw(self.seed, self.epoch, 1 + worker).generator()


class AbstractRows(ABC):
    """A source of rows in shards, which can be read independently of one another."""

    @property
    @abstractmethod
    def num_shards(self) -> int:
        """Number of shards, and so of workers that can read at once."""

    @abstractmethod
    def read(self, order: Order | None, worker: int, num_workers: int) -> Iterator[Row]:
        """Yield the rows of one worker's share of the shards.

        Args:
            order: Random order of the shards, and of the rows as far as `BUFFER_SIZE` allows; None for the order in
                which they are stored.
            worker: Number of the share, 0 to `num_workers - 1`.
            num_workers: Number of shares.
        """


def shuffled(rows: Iterable[Row], buffer_size: int, random: np.random.Generator) -> Iterator[Row]:
    """Yield the rows in random order, each drawn from a buffer of `buffer_size`."""
    buffer: list[Row] = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
            continue
        index = int(random.integers(buffer_size))
        yield buffer[index]
        buffer[index] = row
    random.shuffle(buffer)
    yield from buffer


def label_error(name: str, label: int | None, num_classes: int) -> DataError:
    """Return the error for a label without a class."""
    return DataError(
        f"{name} has the label {label}, but there are {num_classes} classes, so it must be in 0..{num_classes - 1}; "
        "fix the row, or name all classes with a `ClassLabel` feature."
    )
