"""Handling of images that cannot be decoded, and checks of the options of decoding."""

import logging
from typing import Literal, get_args

from revnet.errors import DataError

_log = logging.getLogger("revnet.data")

OnCorrupt = Literal["stop", "skip"]
"""Handling of an image that cannot be decoded: raise a DataError, or leave the image out and log it once."""

DEFAULT_IMAGE_SIZE = 224
"""Usual image size for ImageNet."""


def check_on_corrupt(on_corrupt: str) -> None:
    """Raise unless `on_corrupt` is one of the choices."""
    if on_corrupt not in get_args(OnCorrupt):
        raise ValueError(f"`on_corrupt` (='{on_corrupt}') must be one of {', '.join(get_args(OnCorrupt))}.")


def check_image_size(image_size: int) -> None:
    """Raise unless `image_size` is a positive integer."""
    if not isinstance(image_size, int) or isinstance(image_size, bool):
        raise TypeError(
            f"`image_size` (={image_size!r}) must be one integer, the side of a square; pass 224, for instance."
        )
    if image_size < 1:
        raise ValueError(f"`image_size` (={image_size}) must be positive; pass 224, for instance.")


def corrupt_error(name: str, reason: str) -> DataError:
    """Return the error that "stop" raises for the image `name`."""
    return DataError(
        f"{name} cannot be decoded: {reason}; restore it, or set `on_corrupt` to 'skip' to leave such images out."
    )


def log_skipped(name: str, reason: str) -> None:
    """Log that "skip" left out the image `name`; the message goes to stderr unless the program configures logging."""
    _log.warning("skipped %s: %s", name, reason)
