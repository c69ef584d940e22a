"""Encoded images that come one after the other, and how they are mixed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from revnet.data._crop import Draw
from revnet.errors import DataError

BUFFER_SIZE = 1000
"""Encoded images that wait in each worker to be mixed; some 100 MB of ImageNet's."""


class Row(NamedTuple):
    """One image, as it was stored."""

    encoded: bytes
    """What an image file holds."""
    label: int | None
    """Its class, as it was stored."""
    where: str
    """Its name, for messages."""


class Order(NamedTuple):
    """A random order, another in each epoch."""

    seed: int
    """Which orders."""
    epoch: int
    """Which of them."""

    def of_shards(self) -> np.random.Generator:
        """What decides on the order of the shards: the same in every worker."""
        return Draw(self.seed, self.epoch, 0).generator()

    def of_rows(self, worker: int) -> np.random.Generator:
        """What mixes the rows of one worker."""
        return Draw(self.seed, self.epoch, 1 + worker).generator()


class AbstractRows(ABC):
    """A source of rows in shards, which can be read one without another."""

    @property
    @abstractmethod
    def num_shards(self) -> int:
        """How many workers can read at once."""

    @abstractmethod
    def read(self, order: Order | None, worker: int, num_workers: int) -> Iterator[Row]:
        """The rows of one worker's share of the shards.

        Args:
            order: Which random order the shards come in, and the rows as far as `BUFFER_SIZE` allows; None for the
                order in which they are stored.
            worker: Which share, 0 to `num_workers - 1`.
            num_workers: How many shares there are.
        """


def mix(rows: Iterable[Row], buffer_size: int, order: np.random.Generator) -> Iterator[Row]:
    """Hand out the rows in random order, each drawn from the `buffer_size` that wait."""
    waiting: list[Row] = []
    for row in rows:
        if len(waiting) < buffer_size:
            waiting.append(row)
            continue
        place = int(order.integers(buffer_size))
        yield waiting[place]
        waiting[place] = row
    order.shuffle(waiting)
    yield from waiting


def label_error(where: str, label: int | None, num_classes: int) -> DataError:
    """The error of a label without a class."""
    return DataError(
        f"{where} has the label {label}, but there are {num_classes} classes, so it must lie in 0..{num_classes - 1}; "
        "mend the row, or name all classes with a `ClassLabel` feature."
    )
