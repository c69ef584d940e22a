"""Small images for tests that store and load them."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revnet.data import ImageDataset, load_dataset
from revnet.data.decoding.crop import CenterCrop
from revnet.data.splits.file_split import FileSplit

NUM_STREAMED = 25
CLASS_NAMES = ("cat", "dog", "frog")


def random_images(num_images: int, channels: int = 3, height: int = 5, width: int = 4, seed: int = 0) -> Tensor:
    """Return noise: (N, C, H, W), uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num_images, channels, height, width), generator=generator, dtype=torch.uint8)


def encode(image: Tensor) -> bytes:
    """Encode a (C, H, W) uint8 tensor as PNG, which is lossless."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).numpy()
    stream = BytesIO()
    Image.fromarray(pixels[..., 0] if image.shape[0] == 1 else pixels).save(stream, format="PNG")
    return stream.getvalue()


def write_image(file: Path, image: Tensor | None = None) -> None:
    """Write an image (noise by default) in the format that the file name implies, and create its folder."""
    from PIL import Image

    image = random_images(1, height=12, width=16)[0] if image is None else image
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.open(BytesIO(encode(image))).save(file)


def split_with_an_empty_file(folder: Path, num_images: int, empty: int) -> FileSplit:
    """Write images to `folder`, number `empty` as an empty file, which the split skips. The labels are the numbers."""
    files = [folder / f"{number}.png" for number in range(num_images)]
    for file in files:
        write_image(file)
    files[empty].write_bytes(b"")
    return FileSplit(files, torch.arange(num_images), image_size=4, crop=CenterCrop(), on_corrupt="skip")


def flat_image(level: int, height: int = 12, width: int = 16) -> Tensor:
    """Return an image of one gray level, which crops and resizing do not change."""
    return torch.full((3, height, width), level, dtype=torch.uint8)


def write_stream(folder: Path, write_parquet: Callable[..., None], **options: Any) -> ImageDataset:
    """Write 25 images to three files; each has its own size and one gray level, ten times its label."""
    images = [flat_image(10 * number, height=4 + number, width=30 - number) for number in range(NUM_STREAMED)]
    class_names = [str(number) for number in range(NUM_STREAMED)]
    for index, start in enumerate(range(0, NUM_STREAMED, 9)):
        labels = range(NUM_STREAMED)[start : start + 9]
        file = folder / f"train-0000{index}-of-00003.parquet"
        write_parquet(file, images[start : start + 9], labels, class_names=class_names)
    write_parquet(folder / "test-00000-of-00001.parquet", images[:3], [0, 1, 2], class_names=class_names)
    return load_dataset(folder, image_size=4, **options)
