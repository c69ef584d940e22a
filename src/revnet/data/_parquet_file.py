"""One parquet file of encoded images and labels: read by Hugging Face `datasets`, decoded into one tensor."""

import glob
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revnet.data._optional import require
from revnet.errors import DataError

_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label")


@dataclass(frozen=True, eq=False)
class ParquetImages:
    """What one file holds."""

    file: Path
    """Where it was read, for error messages."""
    images: Tensor
    """The decoded pixels: (N, C, H, W), uint8, C = 1 or 3."""
    labels: list[int | None]
    """As they stand in the file; a missing one is None."""
    class_names: tuple[str, ...] | None
    """From the schema's metadata, None where it has none."""


def read_parquet_file(file: Path) -> ParquetImages:
    """Read one file whole and decode its images.

    Raises:
        DataError: The file is not a parquet file, has no such columns or no rows, or an image cannot be used.
        MissingDependencyError: Hugging Face `datasets` or Pillow is not installed.
    """
    datasets = require("datasets", package="Hugging Face `datasets`", purpose="reading parquet files")
    require("PIL.Image", package="Pillow", purpose="decoding images")
    encoded, labels, label_feature = _read_columns(datasets, file)
    if not str(getattr(label_feature, "dtype", "")).startswith(("int", "uint")):
        raise DataError(f"the labels of '{file}' must be integers, not {label_feature}; store class numbers.")
    if not encoded:
        raise DataError(f"'{file}' holds no images; download it again, or remove it.")
    names = getattr(label_feature, "names", None)
    return ParquetImages(file, _decode_images(datasets, encoded, file), labels, tuple(names) if names else None)


def _read_columns(datasets: ModuleType, file: Path) -> tuple[list[Any], list[Any], Any]:
    """The encoded images, the labels, and the feature (the type, in `datasets`) of the labels."""
    encoded: list[Any] = []
    labels: list[Any] = []
    # A stream makes no Arrow copy of the file, only lock files, which go with the temporary folder.
    with tempfile.TemporaryDirectory() as scratch, _silent(datasets.__name__):
        try:
            table = datasets.load_dataset(
                "parquet",
                data_files=glob.escape(str(file.absolute())),  # a bracket in a folder's name is not a pattern
                split="train",
                streaming=True,
                cache_dir=scratch,
            )
            image_column, label_column = _find_columns(table.features, file)
            label_feature = table.features[label_column]
            table = table.select_columns([image_column, label_column])
            table = table.cast_column(image_column, datasets.Image(decode=False))
            for batch in table.iter(batch_size=1000):
                encoded += batch[image_column]
                labels += batch[label_column]
        except DataError:
            raise
        except Exception as error:  # Arrow's errors derive from OSError, ValueError, TypeError, KeyError and others
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise DataError(f"'{file}' cannot be read as parquet: {reason}; download it again.") from error
    return encoded, labels, label_feature


def _find_columns(columns: Sequence[str], file: Path) -> tuple[str, str]:
    image = next((name for name in _IMAGE_COLUMNS if name in columns), None)
    label = next((name for name in _LABEL_COLUMNS if name in columns), None)
    if image is None or label is None:
        raise DataError(
            f"'{file}' has the columns {', '.join(columns)}; it must have one of {', '.join(_IMAGE_COLUMNS)} "
            f"and one of {', '.join(_LABEL_COLUMNS)}; rename them."
        )
    return image, label


def _decode_images(datasets: ModuleType, encoded: Sequence[Any], file: Path) -> Tensor:
    decoder = datasets.Image()
    images = np.empty(0, dtype=np.uint8)
    for row, value in enumerate(encoded):
        pixels = _decode_image(decoder, value, f"row {row} of '{file}'")
        if row == 0:
            images = np.empty((len(encoded), *pixels.shape), dtype=np.uint8)
        elif pixels.shape != images.shape[1:]:
            raise DataError(
                f"row {row} of '{file}' holds an image of shape {pixels.shape} (channels, height, width), "
                f"row 0 one of {images.shape[1:]}; convert them all to one mode and size."
            )
        images[row] = pixels
    return torch.from_numpy(images)


def _decode_image(decoder: Any, value: Any, where: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    # Without bytes, the decoder would open the `path`, which leads out of the file to anywhere.
    if value is None or not value["bytes"]:
        raise DataError(f"{where} holds no image; store the encoded image itself in `bytes`, not a path to it.")
    try:
        image = decoder.decode_example(value)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        raise DataError(f"{where} holds an image that cannot be decoded; download the file again.") from error
    if image.mode not in ("L", "RGB"):
        raise DataError(f"{where} holds an image of mode {image.mode}; convert it to 8-bit grey (L) or RGB.")
    pixels = np.asarray(image)
    return pixels[None] if image.mode == "L" else pixels.transpose(2, 0, 1)  # (C, H, W)


@contextmanager
def _silent(logger_name: str) -> Iterator[None]:
    """Keep a library from logging an error that we raise in our own words."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
