from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from revnet.data.decoding.crop import RandomResizedCrop
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.data.splits.file_split import FileSplit
from revnet.data.splits.image_split import ImageSplit
from tests.data.samples import NUM_STREAMED, random_images, write_image, write_stream


@pytest.fixture(params=["memory", "files", "stream"])
def any_split(request: pytest.FixtureRequest, tmp_path: Path, write_parquet: Callable[..., None]) -> AbstractSplit:
    """Return a split of 25 images: in memory, in files with random crops, or as a stream with random crops."""
    if request.param == "stream":
        return write_stream(tmp_path / "parquet", write_parquet).train
    images, labels = random_images(NUM_STREAMED, height=12, width=16), torch.arange(NUM_STREAMED)
    if request.param == "memory":
        return ImageSplit(images, labels)
    files = [tmp_path / f"{number:02}.png" for number in range(NUM_STREAMED)]
    for file, image in zip(files, images, strict=True):
        write_image(file, image)
    return FileSplit(files, labels, image_size=4, crop=RandomResizedCrop())
