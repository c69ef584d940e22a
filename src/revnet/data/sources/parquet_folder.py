"""A folder of labeled images in the layout of the Hugging Face hub: `train-*.parquet` and `test-*.parquet`.

The hub stores CIFAR-10, CIFAR-100, MNIST, Fashion-MNIST and many other data sets in this layout.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from revnet.data.decoding.corrupt import OnCorrupt, check_image_size, check_on_corrupt, corrupt_error, log_skipped
from revnet.data.decoding.crop import AbstractCrop, CenterCrop, RandomResizedCrop
from revnet.data.decoding.decode import Pixels, UndecodableError, decode_whole, require_pillow
from revnet.data.sources._parquet_file import ParquetFile, ParquetRows
from revnet.data.sources._parquet_layout import ParquetLayout, join_labels, read_parquet_layout
from revnet.data.splits.image_dataset import ImageDataset
from revnet.data.splits.image_split import ImageSplit
from revnet.data.splits.stream_split import StreamSplit
from revnet.errors import DataError


def load_parquet_folder(
    path: str | Path,
    *,
    image_size: int | None = None,
    on_corrupt: OnCorrupt = "stop",
    crop_area: tuple[float, float] = (0.08, 1.0),
    name: str | None = None,
) -> ImageDataset:
    """Load a data set from a folder of parquet files.

    The files may be in the folder or in one folder directly inside it, as in a clone of a hub repository. Each has a
    column of encoded images (`img` or `image`) and one of integer labels (`label` or `fine_label`); other columns are
    not read. Class names come from the metadata of the schema. Without them, classes are named by their numbers, and
    the training labels must be 0..K-1 without gaps. `validation-*.parquet` may replace `test-*.parquet`, and is also
    used if the test files have no labels.

    Without `image_size`, every image is decoded on loading; all must have one size, and all must be gray or all in
    color. Nothing is written, so the folder may be read-only: decoding CIFAR-10 takes seconds, and a cache of decoded
    images would save little. With `image_size`, images of any size are decoded to RGB batch by batch, see
    `load_dataset`.

    Args:
        path: The folder; `~` is the home directory.
        image_size: Height and width of the decoded images; None keeps their own size, and all images in memory.
        on_corrupt: Handling of an image that cannot be decoded: "stop" raises a DataError that names the image,
            "skip" leaves the image out and logs it once.
        crop_area: Smallest and largest share of a training image that a random crop keeps, if `image_size` is given.
        name: Name of the data set; by default the name of the folder.

    Raises:
        ValueError: An option is out of range.
        DataError: The folder or a part of it is missing, a file is corrupt or of another layout, or an image or label
            breaks the rules above. The message names the file and, if there is one, the row.
        MissingDependencyError: Hugging Face `datasets` or Pillow is not installed.
    """
    check_on_corrupt(on_corrupt)
    require_pillow()
    if image_size is None:
        layout = read_parquet_layout(path)
        train, test = _decode_files(layout, on_corrupt)
        return ImageDataset(name or layout.name, train, test, layout.class_names)
    check_image_size(image_size)
    crops = (RandomResizedCrop(crop_area), CenterCrop())
    layout = read_parquet_layout(path)

    def stream(files: Sequence[ParquetFile], crop: AbstractCrop) -> StreamSplit:
        labels = join_labels(files)
        return StreamSplit(
            ParquetRows(files),
            num_images=len(labels),
            num_classes=len(layout.class_names),
            image_size=image_size,
            crop=crop,
            on_corrupt=on_corrupt,
            labels=labels,
        )

    return ImageDataset(
        name or layout.name, stream(layout.train, crops[0]), stream(layout.test, crops[1]), layout.class_names
    )


def _decode_files(layout: ParquetLayout, on_corrupt: OnCorrupt) -> tuple[ImageSplit, ImageSplit]:
    train, test = ([_decode_file(file, on_corrupt) for file in files] for files in (layout.train, layout.test))
    first = train[0].images.shape[1:]
    for file, part in zip((*layout.train, *layout.test), (*train, *test), strict=True):
        if part.images.shape[1:] != first:
            raise DataError(
                f"'{file.path}' holds images of shape {tuple(part.images.shape[1:])} (channels, height, width), "
                f"'{layout.train[0].path}' of {tuple(first)}; {_ONE_SIZE}"
            )
    return _join(train), _join(test)


_ONE_SIZE = "pass `image_size` to resize them to one size, in RGB, or convert them all."


def _decode_file(file: ParquetFile, on_corrupt: OnCorrupt) -> ImageSplit:
    images = np.empty(0, dtype=np.uint8)
    labels: list[int] = []
    for row in ParquetRows([file]).read(None, 0, 1):
        try:
            pixels = _channels_first(decode_whole(row.encoded))
        except UndecodableError as error:
            if on_corrupt == "stop":
                raise corrupt_error(row.name, str(error)) from error
            log_skipped(row.name, str(error))
            continue
        if not labels:
            first = row.name
            images = np.empty((len(file.labels), *pixels.shape), dtype=np.uint8)
        elif pixels.shape != images.shape[1:]:
            raise DataError(
                f"{row.name} holds an image of shape {pixels.shape} (channels, height, width), {first} one of "
                f"{images.shape[1:]}; {_ONE_SIZE}"
            )
        images[len(labels)] = pixels
        assert row.label is not None  # the layout was checked
        labels.append(row.label)
    if not labels:
        raise DataError(f"no image of '{file.path}' can be decoded; download the file again.")
    return ImageSplit(torch.from_numpy(images[: len(labels)]), torch.tensor(labels))


def _channels_first(pixels: Pixels) -> Pixels:
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # (C, H, W)


def _join(parts: Sequence[ImageSplit]) -> ImageSplit:
    # Most data sets have one file per split, which then needs no second copy of its pixels.
    if len(parts) == 1:
        return parts[0]
    return ImageSplit(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))
