"""One batch decoded, with what could not be: in a worker process or in the main one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from revnet.data._crop import AbstractCrop, Draw
from revnet.data._decode import UndecodableError, decode
from revnet.errors import DataError

_log = logging.getLogger("revnet.data")

OnCorrupt = Literal["stop", "skip"]
"""What to do about an image that cannot be decoded: raise a DataError, or leave it out and name it once."""

DEFAULT_IMAGE_SIZE = 224
"""What ImageNet is usually seen at."""


def check_on_corrupt(on_corrupt: str) -> None:
    """Refuse a misspelt choice before it passes for another."""
    if on_corrupt not in get_args(OnCorrupt):
        raise ValueError(f"`on_corrupt` (='{on_corrupt}') must be one of {', '.join(get_args(OnCorrupt))}.")


def check_image_size(image_size: int) -> None:
    """Refuse a size that no image can have."""
    if not isinstance(image_size, int) or isinstance(image_size, bool):
        raise TypeError(
            f"`image_size` (={image_size!r}) must be one whole number, the side of a square; pass 224, say."
        )
    if image_size < 1:
        raise ValueError(f"`image_size` (={image_size}) must be positive; pass 224, for instance.")


def corrupt_error(where: str, reason: str) -> DataError:
    """The error that "stop" raises."""
    return DataError(
        f"{where} cannot be decoded: {reason}; restore it, or pass `on_corrupt='skip'` to leave such images out."
    )


def tell_skipped(where: str, reason: str) -> None:
    """What "skip" says, on stderr unless the program that uses this package has set up logging."""
    _log.warning("skipped %s: %s", where, reason)


class Encoded(NamedTuple):
    """An image that is still to be decoded."""

    source: str | bytes
    """Its file, or what such a file holds."""
    where: str
    """Its name, for messages."""
    label: int
    """Its class."""
    draw: Draw
    """What its random crop depends on."""


class Decoded(NamedTuple):
    """What a worker hands over.

    Failures travel as data, for PyTorch would put a whole traceback into an error's message.
    """

    images: Tensor
    """The pixels of those that could be decoded: (B, 3, H, W), uint8."""
    labels: Tensor
    """Their classes: (B,), int64."""
    corrupt: tuple[tuple[str, str], ...] = ()
    """Name and reason of each image that could not be decoded."""
    fatal: str | None = None
    """A message for the user, if nothing can come after this batch."""


def decode_batch(rows: Sequence[Encoded], crop: AbstractCrop, size: tuple[int, int]) -> Decoded:
    """Decode images straight into one tensor."""
    images = torch.empty((len(rows), 3, *size), dtype=torch.uint8)
    pixels = images.numpy()
    labels: list[int] = []
    corrupt: list[tuple[str, str]] = []
    for row in rows:
        try:
            pixels[len(labels)] = decode(row.source, crop, size, row.draw).transpose(2, 0, 1)
        except UndecodableError as error:
            corrupt.append((row.where, str(error)))
        else:
            labels.append(row.label)
    return Decoded(images[: len(labels)], torch.tensor(labels, dtype=torch.int64), tuple(corrupt))
