"""Decoding of one batch, in a worker process or in the main one."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from revnet.data.decoding.crop import AbstractCrop
from revnet.data.decoding.decode import UndecodableError, decode
from revnet.data.decoding.image_draw import Draw


class EncodedImage(NamedTuple):
    """An image before it is decoded."""

    source: str | bytes
    """Path of the file, or its content."""
    name: str
    """Name of the image in messages."""
    label: int
    """Class of the image."""
    draw: Draw
    """Random numbers of its crop."""


class DecodedBatch(NamedTuple):
    """The result of a worker.

    Failures are returned as data, because PyTorch would put a whole traceback into the message of an exception.
    """

    images: Tensor
    """Pixels of the images that could be decoded: (B, 3, H, W), uint8."""
    labels: Tensor
    """Classes of these images: (B,), int64."""
    numbers: Tensor
    """Numbers that identify these images, and that their random numbers depend on: (B,), int64."""
    corrupt: tuple[tuple[str, str], ...] = ()
    """Name and reason of each image that could not be decoded."""
    fatal: str | None = None
    """Message of an error that ends the epoch after this batch."""

    @classmethod
    def empty(cls, corrupt: tuple[tuple[str, str], ...] = (), fatal: str | None = None) -> Self:
        """Return a batch without images."""
        none = torch.empty(0, dtype=torch.int64)
        return cls(torch.empty(0, 3, 1, 1, dtype=torch.uint8), none, none, corrupt, fatal)

    def part(self, part: range) -> Self:
        """Return consecutive images as a batch of their own, without the failures."""
        own = slice(part.start, part.stop)
        return type(self)(self.images[own], self.labels[own], self.numbers[own])


def decode_batch(rows: Sequence[EncodedImage], crop: AbstractCrop, size: tuple[int, int]) -> DecodedBatch:
    """Decode images directly into one tensor."""
    images = torch.empty((len(rows), 3, *size), dtype=torch.uint8)
    pixels = images.numpy()
    labels: list[int] = []
    numbers: list[int] = []
    corrupt: list[tuple[str, str]] = []
    for row in rows:
        try:
            pixels[len(labels)] = decode(row.source, crop, size, row.draw).transpose(2, 0, 1)
        except UndecodableError as error:
            corrupt.append((row.name, str(error)))
        else:
            labels.append(row.label)
            numbers.append(row.draw.image)
    return DecodedBatch(
        images[: len(labels)],
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(numbers, dtype=torch.int64),
        tuple(corrupt),
    )
