"""Compute the likelihood of image files under a fitted density."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from revnet._atomic_file import write_csv
from revnet._checks import check_path, check_paths
from revnet._image_files import list_images
from revnet._outside_text import csv_cell
from revnet.data._random_keys import image_keys
from revnet.errors import DataError
from revnet.training.density.model import ImageDensity, load_density
from revnet.training.device import find_device
from revnet.training.image_data import read_image
from revnet.training.settings.checks import check_integer

_OnError = Callable[[DataError], object]

_BATCH_SIZE = 100


@dataclass(frozen=True, kw_only=True)
class ImageScore:
    """Likelihood of one image under a density."""

    path: Path
    """Path of the image file, as given."""

    bits_per_dim: float
    """Bits per dimension: the cost of each component of the image, an upper bound on average over the noise."""

    log_prob: float
    """Natural logarithm of the probability of the pixels, which the bits per dimension bound from below."""


def score_images(
    checkpoint: str | Path,
    paths: Iterable[str | Path],
    *,
    num_draws: int = 1,
    seed: int = 0,
    device: str = "auto",
    on_error: _OnError | None = None,
) -> list[ImageScore]:
    """Compute the bits per dimension of image files under the density of `checkpoint`.

    Each image is converted to the size and channels of the training images, as `predict_images` does. All images get
    the same noise, so the score of an image does not depend on the other images.

    Args:
        checkpoint: A `.safetensors` or `.ckpt` file that `revnet train nice` has written, or the folder of a run, whose
            last weights are loaded.
        paths: Image files, folders, and patterns such as `photos/**/*.jpg`, as `predict_images` takes them.
        num_draws: Number of draws of the noise to average over.
        seed: Seed of the noise.
        device: `cpu`, `cuda`, `cuda:1`, `xpu` or `mps`; `auto` takes a GPU if there is one, but never `xpu`.
        on_error: Function that is called with the error of a file that cannot be read; the file is then left out. By
            default the error is raised.

    Returns:
        A score for every file that could be read, in the order of `paths`.

    Raises:
        CheckpointError: `checkpoint` is missing, truncated, or does not hold a density.
        DataError: A file is missing or not an image, and `on_error` is not given.
        TypeError: `paths` is a single path, or holds something else.
        ValueError: `device` is not available, or a number is out of range.
    """
    return list(score_each(checkpoint, paths, num_draws=num_draws, seed=seed, device=device, on_error=on_error))


def score_each(
    checkpoint: str | Path,
    paths: Iterable[str | Path],
    *,
    num_draws: int = 1,
    seed: int = 0,
    device: str = "auto",
    on_error: _OnError | None = None,
) -> Iterator[ImageScore]:
    """Yield the scores of `score_images`, each as soon as its batch is done."""
    check_path("checkpoint", checkpoint, hint="a file of weights, or the folder of a run")
    paths = check_paths("paths", paths)
    num_draws = check_integer("num_draws", num_draws, at_least=1)
    seed = check_integer("seed", seed, at_least=0, at_most=2**32 - 1)
    torch_device = find_device(device)
    density = load_density(checkpoint).to(torch_device)
    files = list_images(paths)
    for start in range(0, len(files), _BATCH_SIZE):
        read: list[tuple[Path, Tensor]] = []
        for file in files[start : start + _BATCH_SIZE]:
            try:
                read.append((file, read_image(file, density.header.image_shape, is_resized=density.header.is_resized)))
            except DataError as error:
                if on_error is None:
                    raise
                on_error(error)
        if read:
            yield from _score_batch(density, read, num_draws, seed, torch_device)


def save_scores(scores: Sequence[ImageScore], path: str | Path) -> None:
    """Write a CSV file with a row for each image: file, bits_per_dim, log_prob."""
    rows = [[csv_cell(str(score.path)), score.bits_per_dim, score.log_prob] for score in scores]
    write_csv(Path(path), [["file", "bits_per_dim", "log_prob"], *rows])


@torch.no_grad()
def _score_batch(
    density: ImageDensity, read: Sequence[tuple[Path, Tensor]], num_draws: int, seed: int, device: torch.device
) -> Iterator[ImageScore]:
    images = torch.stack([image for _, image in read]).to(device)
    total = torch.zeros(len(images), dtype=torch.float64)
    for key in image_keys(seed, 0, torch.arange(num_draws)):
        total += density(images, keys=key.expand(len(images))).double().cpu()
    nats_per_bit = density.model.num_components * math.log(2)
    for (file, _), bits in zip(read, (total / num_draws).tolist(), strict=True):
        yield ImageScore(path=file, bits_per_dim=bits, log_prob=-bits * nats_per_bit)
