"""Decoding of image files to pixels of the requested size. No other file depends on how Pillow behaves."""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from revnet._checks import check_path
from revnet._input_files import read_bytes
from revnet._paths import expand_user
from revnet.data._require import require
from revnet.data.decoding.crop import AbstractCrop, Box, CenterCrop
from revnet.data.decoding.image_draw import Draw
from revnet.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
"""Formats of images, by Pillow's names. Pillow opens others with programs of the system, such as Ghostscript."""

_MOST_PIXELS = 100_000_000
_LIMIT_VARIABLE = "REVNET_MAX_PIXELS"
"""Environment variable with another limit, which worker processes inherit."""
_LONGEST_LIMIT = 11
"""Digits of the largest limit."""
_MOST_BYTES = 2**30
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_ANY_DRAW = Draw(0, 0, 0)


class UndecodableError(Exception):
    """An image cannot be decoded. The message contains only the reason; callers add the name of the image.

    Args:
        reason: Why it cannot.
        way_out: What to do about it, if that is not to pass another file.
    """

    def __init__(self, reason: str, way_out: str = ""):
        super().__init__(f"{reason} ({way_out})" if way_out else reason)
        self.reason = reason
        self.way_out = way_out


def require_pillow() -> None:
    """Raise if Pillow is missing, before a worker process fails without it."""
    require("PIL.Image", package="Pillow", purpose="decoding images")


def decode(source: str | bytes, crop: AbstractCrop, size: tuple[int, int], draw: Draw, mode: str = "RGB") -> Pixels:
    """Read and decode an image, and resize the part that `crop` chooses.

    Every kind of image is converted to `mode`: palettes are resolved, CMYK is converted, transparent pixels are put on
    white, 16-bit gray keeps its upper 8 bits, and photographs are rotated upright according to their metadata.

    Args:
        source: Path of a file, or its content.
        crop: Rule that chooses the part.
        size: Height and width of the result.
        draw: Random numbers of the crop.
        mode: "RGB" or "L" (gray).

    Returns:
        The pixels, (height, width, 3), or (height, width) for gray.

    Raises:
        UndecodableError: The file cannot be read, is not a regular file, has too many pixels, or does not hold a
            complete image in one of the `FORMATS`.

    Numerics:
        Bilinear, with a wider filter where the image shrinks. A JPEG that would shrink to half its size or less is
        decoded at 1/2, 1/4 or 1/8 of its size, which the format allows, and resized from there.
    """
    with _pillow_errors():
        encoded = source if isinstance(source, bytes) else read_bytes(source, _MOST_BYTES)
        return _decode_part(encoded, crop, size, draw, mode)


def decode_whole(encoded: bytes) -> Pixels:
    """Decode an image at its own size: (height, width) if it is gray, (height, width, 3) if it is in color.

    Raises:
        UndecodableError: `encoded` is not a complete image of a known kind.
    """
    with _pillow_errors():
        image = _open(encoded)
        _load(image)
        return np.asarray(_to_gray_or_rgb(_turn_upright(image, _orientation(image))))


def load_image(
    path: str | Path, *, image_size: tuple[int, int], in_channels: int, crop_fraction: float = 1.0
) -> Tensor:
    """Load one image file as network input, decoded in the same way as the files of a data set.

    The image is resized to just cover `image_size` divided by `crop_fraction`; then its center is cut out.

    Args:
        path: The file; `~` is the home directory.
        image_size: Height and width of the result.
        in_channels: 3 for RGB, 1 for gray.
        crop_fraction: Share of the shorter side that is kept; `load_dataset` uses 0.875 for test images.

    Shape:
        Output: (C, H, W), uint8.

    Raises:
        ValueError: `image_size` is not positive, `in_channels` is neither 1 nor 3, or `crop_fraction` is not in 0..1.
        DataError: The file is missing, or is not an image.
        MissingDependencyError: Pillow is not installed.
    """
    check_path("path", path, hint="the path of an image")
    modes = {1: "L", 3: "RGB"}
    if in_channels not in modes:
        raise ValueError(f"`in_channels` (={in_channels}) must be 1 (gray) or 3 (RGB); files hold no other images.")
    if not isinstance(image_size, Sequence) or len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f"`image_size` (={image_size}) must be positive; pass (height, width).")
    crop = CenterCrop(crop_fraction)
    require_pillow()
    try:
        pixels = decode(str(expand_user(path)), crop, image_size, _ANY_DRAW, modes[in_channels])
    except UndecodableError as error:
        way_out = error.way_out or "pass the path of an image"
        raise DataError(f"'{path}' cannot be decoded: {error.reason}; {way_out}.") from error
    return torch.from_numpy(pixels.reshape(*image_size, in_channels).transpose(2, 0, 1).copy())


@contextmanager
def _pillow_errors() -> Iterator[None]:
    """Turn every exception of a decoder into an UndecodableError, and suppress its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, which does not affect pixels, and large photographs
            yield
    except UndecodableError:
        raise
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error and others
        raise UndecodableError(_reason(error)) from error


def _decode_part(encoded: bytes, crop: AbstractCrop, size: tuple[int, int], draw: Draw, mode: str) -> Pixels:
    from PIL import Image

    image = _open(encoded)
    if image.format == "TIFF":
        _load(image)  # Pillow turns a TIFF upright as it loads it, and may report the upright size before
    orientation = _orientation(image)
    upright = image.size[::-1] if orientation in _SIDEWAYS else image.size
    box = crop.box(*upright, size, draw)
    wanted = _smallest_useful_size(upright, box, size)
    image.draft(None, wanted[::-1] if orientation in _SIDEWAYS else wanted)  # affects JPEG only
    _load(image)
    image = _turn_upright(image, orientation)
    x, y = image.width / upright[0], image.height / upright[1]
    shrunk_box = (box[0] * x, box[1] * y, min(box[2] * x, image.width), min(box[3] * y, image.height))
    height, width = size
    part = _to_gray_or_rgb(image).resize((width, height), Image.Resampling.BILINEAR, box=shrunk_box)
    return np.asarray(part if part.mode == mode else part.convert(mode))


def _open(encoded: bytes) -> "Image":
    from PIL import Image, UnidentifiedImageError

    if not encoded:
        raise UndecodableError("it is empty")
    limit = most_pixels()
    if Image.MAX_IMAGE_PIXELS is not None and limit > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limit  # Pillow refuses twice as many before a JPEG can be decoded at a smaller size
    try:
        return Image.open(BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        if not _has_other_format(encoded):
            raise
        raise UndecodableError(f"its format is not one of {', '.join(FORMATS)}", "convert it") from None
    except Image.DecompressionBombError as error:
        raise UndecodableError(*_too_large(limit)) from error


def _has_other_format(encoded: bytes) -> bool:
    """Return whether the bytes begin like HEIC or AVIF, PostScript, Photoshop, JPEG 2000 or SVG."""
    return encoded[4:8] == b"ftyp" or encoded.lstrip()[:4] in (b"%!PS", b"8BPS", b"\0\0\0\x0c", b"<svg", b"<?xm")


def _load(image: "Image") -> None:
    """Decode the pixels; raise if the image, as it will be decoded, has too many of them."""
    limit = most_pixels()
    if image.width * image.height > limit:
        reason, way_out = _too_large(limit)
        raise UndecodableError(f"{reason}: {image.width:,} x {image.height:,}", way_out)
    image.load()


def most_pixels() -> int:
    """Return the largest number of pixels of an image, which the environment variable `REVNET_MAX_PIXELS` sets.

    Raises:
        ValueError: The variable is not a positive integer.
    """
    text = os.environ.get(_LIMIT_VARIABLE, "")
    if not text:
        return _MOST_PIXELS
    if not text.isdecimal() or len(text) > _LONGEST_LIMIT or int(text) == 0:
        raise ValueError(
            f"the environment variable {_LIMIT_VARIABLE} (={text}) must be a number of pixels, such as 400000000."
        )
    return int(text)


def _too_large(limit: int) -> tuple[str, str]:
    """Return the reason and the way out."""
    return f"it has more than {limit:,} pixels", f"shrink it, or set {_LIMIT_VARIABLE} to a larger number"


def _turn_upright(image: "Image", orientation: int) -> "Image":
    from PIL import ImageOps

    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _orientation(image: "Image") -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if the metadata does not contain it."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the pixels may be fine although the metadata cannot be read
        return 1


def _smallest_useful_size(image_size: tuple[int, int], box: Box, size: tuple[int, int]) -> tuple[int, int]:
    """Return the width and height of the whole image at which the box has at least the pixels of the result."""
    width, height = image_size
    rows, columns = size
    return math.ceil(width * columns / (box[2] - box[0])), math.ceil(height * rows / (box[3] - box[1]))


def _to_gray_or_rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode == "F":
        raise UndecodableError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # 16 bits, which older versions of Pillow return as 32
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise UndecodableError("its pixels are 32-bit integers of unknown range")
        gray = (pixels >> 8).astype(np.uint8)
        if "transparency" in image.info:
            gray[pixels == image.info["transparency"]] = 255
        return Image.fromarray(gray)
    if image.mode == "1" and "transparency" not in image.info:
        return image.convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "it is not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
