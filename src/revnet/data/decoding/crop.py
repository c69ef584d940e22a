"""The part of an image, of any size, that is resized to the network's input."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from revnet.data.decoding.image_draw import Draw

_ASPECTS = (3 / 4, 4 / 3)
_ATTEMPTS = 10

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge, in pixels."""


class AbstractCrop(ABC):
    """A rule that chooses which part of an image is kept."""

    @abstractmethod
    def box(self, width: int, height: int, size: tuple[int, int], draw: Draw) -> Box:
        """Return the part of an image of `width` x `height` to resize to `size`, which is (height, width)."""


@dataclass(frozen=True)
class RandomResizedCrop(AbstractCrop):
    """A part of random area, aspect ratio and position: the training crop of Inception.

    Raises:
        ValueError: `area` is not a pair of shares in ascending order.

    References:
        Szegedy et al. (2015), Going Deeper with Convolutions, section 6.
    """

    area: tuple[float, float] = (0.08, 1.0)
    """Bounds of the cropped share of the image, drawn uniformly; the aspect ratio is log-uniform in 3/4..4/3."""

    def __post_init__(self) -> None:
        if not _is_pair_of_numbers(self.area) or not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(
                f"`crop_area` (={self.area}) must be two shares of the image in ascending order, above 0 and at most "
                "1; pass (0.08, 1.0), or (1.0, 1.0) to crop no more than the aspect ratio requires."
            )

    def box(self, width: int, height: int, size: tuple[int, int], draw: Draw) -> Box:
        """Return the first of ten random parts that fits, or else the largest centered part of an allowed aspect."""
        low, high = (math.log(aspect) for aspect in _ASPECTS)
        for area, aspect, x, y in draw.generator().random((_ATTEMPTS, 4)).tolist():
            pixels = width * height * (self.area[0] + (self.area[1] - self.area[0]) * area)
            ratio = math.exp(low + (high - low) * aspect)
            w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
                return left, top, left + w, top + h
        return _centered(width, height, min(width, height * _ASPECTS[1]), min(height, width / _ASPECTS[0]))


@dataclass(frozen=True)
class CenterCrop(AbstractCrop):
    """The center of the image: the evaluation crop, which involves no randomness.

    The image is resized to just cover the requested size divided by `fraction`; then its center is cut out.

    Raises:
        ValueError: `fraction` is not above 0 and at most 1.
    """

    fraction: float = 0.875
    """Share of the shorter side that is kept; 0.875 corresponds to the usual 224 of 256 pixels."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"`crop_fraction` (={self.fraction}) must be above 0 and at most 1; pass 0.875 or 1.0.")

    def box(self, width: int, height: int, size: tuple[int, int], draw: Draw) -> Box:
        """Return the part of the original image that resizing and then cropping would leave."""
        rows, columns = size
        scale = min(height / round(rows / self.fraction), width / round(columns / self.fraction))
        return _centered(width, height, min(width, columns * scale), min(height, rows * scale))


def _is_pair_of_numbers(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(item, (int, float)) for item in value)


def _centered(width: int, height: int, w: float, h: float) -> Box:
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h
