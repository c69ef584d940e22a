"""The images that a density is fitted to: images of one size in memory, or photographs that are decoded to one size."""

from dataclasses import replace

import torch

from revnet.data import ImageDataset, load_dataset, make_loader
from revnet.data.decoding.corrupt import OnCorrupt
from revnet.data.decoding.crop import CenterCrop
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.data.splits.file_split import FileSplit
from revnet.data.splits.image_split import ImageSplit
from revnet.memory import format_bytes

_MOST_BYTES = 2**33
"""Largest size of the decoded photographs of a split, which stay in memory."""
_DECODED_AT_ONCE = 500


def load_images(data: str, *, image_size: int | None, on_corrupt: OnCorrupt = "stop") -> ImageDataset:
    """Load a data set whose images are in memory, all of one size.

    Photographs in files are decoded once: the shorter side is resized to `image_size` / 0.875, and the center is cut
    out, as `load_dataset` does with test images.

    Args:
        data: A name, or the path of a data set.
        image_size: Height and width of decoded photographs; None for images that have one size.
        on_corrupt: Response to an image that cannot be decoded.

    Raises:
        DataError: The data set is missing or corrupt.
        ValueError: The images are photographs and `image_size` is None, or the other way around; the photographs do not
            fit into memory; or the images come as a stream.
    """
    dataset = load_dataset(data, image_size=image_size, on_corrupt=on_corrupt)
    if image_size is None and isinstance(dataset.train, FileSplit):
        raise ValueError(
            f"`data` (='{data}') holds photographs of any size, and a density needs one size; pass `image_size`, such "
            "as 32."
        )
    return replace(dataset, train=_in_memory(dataset.train, data), test=_in_memory(dataset.test, data))


def _in_memory(split: AbstractSplit, data: str) -> ImageSplit:
    if isinstance(split, ImageSplit):
        return split
    if not isinstance(split, FileSplit):
        raise ValueError(
            f"`data` (='{data}') comes as a stream or as rows of photographs, but a density needs its images in "
            "memory; pass a folder of image files with `image_size`, or images of one size, such as cifar10."
        )
    num_bytes = len(split) * torch.Size(split.image_shape).numel()
    if num_bytes > _MOST_BYTES:
        raise ValueError(
            f"`image_size` (={split.image_shape[1]}) would make {format_bytes(num_bytes)} of the {len(split):,} "
            f"photographs in '{data}', which must fit into {format_bytes(_MOST_BYTES)} of memory; pass a smaller one."
        )
    files = [split.file(index) for index in range(len(split))]
    centered = FileSplit(
        files, split.labels, image_size=split.image_shape[1], crop=CenterCrop(), on_corrupt=split.on_corrupt
    )
    batches = list(make_loader(centered, batch_size=min(_DECODED_AT_ONCE, len(files)), shuffle=False, seed=0))
    return ImageSplit(torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches]))
