"""A grid of small images in one picture."""

import math
from pathlib import Path

import torch
from torch import Tensor

from revnet.training.atomic_file import atomic_path

_GAP = 1  # pixels of the images
_USUAL_WIDTH = 1000  # of the picture


def save_grid(images: Tensor, path: Path, *, num_columns: int | None = None) -> None:
    """Write images as one PNG file, row by row, and enlarge each pixel to a square.

    Args:
        images: (N, C, H, W), uint8, grayscale or RGB.
        path: The PNG file.
        num_columns: Images in a row; by default the grid is square.
    """
    from PIL import Image

    grid = make_grid(images, num_columns or math.ceil(math.sqrt(len(images))))
    factor = max(1, round(_USUAL_WIDTH / grid.shape[2]))
    pixels = grid.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(1, 2, 0)
    with atomic_path(path) as temporary:
        Image.fromarray(pixels.squeeze(2).contiguous().numpy()).save(temporary, format="png")


def make_grid(images: Tensor, num_columns: int) -> Tensor:
    """Arrange images in a grid on white: (C, height, width), uint8."""
    count, channels, height, width = images.shape
    num_rows = math.ceil(count / num_columns)
    grid = torch.full(
        (channels, num_rows * (height + _GAP) + _GAP, num_columns * (width + _GAP) + _GAP), 255, dtype=torch.uint8
    )
    for number, image in enumerate(images):
        top = _GAP + (number // num_columns) * (height + _GAP)
        left = _GAP + (number % num_columns) * (width + _GAP)
        grid[:, top : top + height, left : left + width] = image
    return grid
