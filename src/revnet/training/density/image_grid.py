"""A grid of small images in one picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revnet._atomic_file import atomic_path
from revnet._outside_text import printable
from revnet._result_files import PICTURE_METADATA

_GAP = 1  # pixels of the images
_USUAL_WIDTH = 1000  # of the grid, in pixels of the picture
_FONT_SIZE, _MARGIN = 22, 8  # in pixels of the picture


def save_grid(
    images: Tensor, path: Path, *, num_columns: int | None = None, title: str = "", row_labels: Sequence[str] = ()
) -> None:
    """Write images as one PNG file, row by row, and enlarge each pixel to a square.

    Args:
        images: (N, C, H, W), uint8, grayscale or RGB.
        path: The PNG file.
        num_columns: Images in a row; by default the grid is square.
        title: Text above the grid.
        row_labels: Texts to the left of the rows.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    grid = make_grid(images, num_columns or math.ceil(math.sqrt(len(images))))
    factor = max(1, round(_USUAL_WIDTH / grid.shape[2]))
    pixels = grid.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(1, 2, 0)
    picture = Image.fromarray(pixels.squeeze(2).contiguous().numpy())
    if title or row_labels:
        picture = _with_texts(picture, title, row_labels)
    metadata = PngInfo()
    for key, text in PICTURE_METADATA.items():
        metadata.add_text(key, text)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="png", pnginfo=metadata)


def _with_texts(picture: Any, title: str, row_labels: Sequence[str]) -> Any:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT_SIZE)
    title, row_labels = printable(title), [printable(label) for label in row_labels]
    left = max((math.ceil(font.getlength(label)) + 2 * _MARGIN for label in row_labels), default=0)
    top = _FONT_SIZE + 2 * _MARGIN if title else 0
    width = max(left + picture.width, math.ceil(font.getlength(title)) + 2 * _MARGIN)
    canvas = Image.new("RGB", (width, top + picture.height), "white")
    canvas.paste(picture, (left, top))
    draw = ImageDraw.Draw(canvas)
    draw.text((left + _MARGIN, _MARGIN), title, fill="black", font=font)
    for row, label in enumerate(row_labels):
        middle = top + picture.height * (row + 0.5) / len(row_labels)
        draw.text((left - _MARGIN, middle), label, fill="black", font=font, anchor="rm")
    return canvas


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
