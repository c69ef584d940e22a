"""Which part of an image of any size becomes the square that the network sees."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_ASPECTS = (3 / 4, 4 / 3)
_ATTEMPTS = 10

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge, in pixels."""


class Draw(NamedTuple):
    """One image in one epoch of one seed: all that its random numbers depend on, in any process and order."""

    seed: int
    epoch: int
    image: int

    def generator(self) -> np.random.Generator:
        """Its own generator: a counter-based one, so that making it costs no warm-up."""
        key = np.array([self.seed % 2**64, self.epoch], dtype=np.uint64)
        # The lowest word counts the numbers drawn.
        return np.random.Generator(np.random.Philox(key=key, counter=[0, self.image, 0, 0]))


class AbstractCrop(ABC):
    """Chooses the part of an image that is resized to the size asked for."""

    @abstractmethod
    def box(self, width: int, height: int, size: tuple[int, int], draw: Draw) -> Box:
        """The part of an image of `width` x `height` that becomes one of `size` (height, width)."""


@dataclass(frozen=True)
class RandomCrop(AbstractCrop):
    """A part of random area, aspect and place: the random resized crop of Inception, for training.

    Raises:
        ValueError: `area` is not a pair of shares in ascending order.

    References:
        Szegedy et al. (2015), Going Deeper with Convolutions, section 6.
    """

    area: tuple[float, float] = (0.08, 1.0)
    """Least and largest share of the image, drawn uniformly; the aspect is log-uniform in 3/4..4/3."""

    def __post_init__(self) -> None:
        if not _is_pair_of_numbers(self.area) or not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(
                f"`crop_area` (={self.area}) must be two shares of the image in ascending order, above 0 and at most "
                "1; pass (0.08, 1.0), or (1.0, 1.0) to crop no more than the aspect asks for."
            )

    def box(self, width: int, height: int, size: tuple[int, int], draw: Draw) -> Box:
        """Up to ten draws for a part that fits; else the largest one in the middle with an aspect in bounds."""
        low, high = (math.log(aspect) for aspect in _ASPECTS)
        for area, aspect, x, y in draw.generator().random((_ATTEMPTS, 4)).tolist():
            pixels = width * height * (self.area[0] + (self.area[1] - self.area[0]) * area)
            ratio = math.exp(low + (high - low) * aspect)
            w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
                return left, top, left + w, top + h
        return _centred(width, height, min(width, height * _ASPECTS[1]), min(height, width / _ASPECTS[0]))


@dataclass(frozen=True)
class CentreCrop(AbstractCrop):
    """The middle of the image, the same each time: what evaluation looks at.

    The image is resized until it just covers the size asked for, divided by `fraction`; then its middle is cut out.

    Raises:
        ValueError: `fraction` is not above 0 and at most 1.
    """

    fraction: float = 0.875
    """Share of the shorter side that is kept; 0.875 leads from 256 pixels to the usual 224."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"`crop_fraction` (={self.fraction}) must be above 0 and at most 1; pass 0.875 or 1.0.")

    def box(self, width: int, height: int, size: tuple[int, int], draw: Draw) -> Box:
        """Resizing and cutting in one step: the part of the original that would remain."""
        rows, columns = size
        scale = min(height / round(rows / self.fraction), width / round(columns / self.fraction))
        return _centred(width, height, min(width, columns * scale), min(height, rows * scale))


def _is_pair_of_numbers(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(item, (int, float)) for item in value)


def _centred(width: int, height: int, w: float, h: float) -> Box:
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h
