"""The random numbers of an image in one epoch, such as the seed of its random crop."""

from typing import NamedTuple

import numpy as np
from torch import Tensor


class Draw(NamedTuple):
    """Seed, epoch and image: everything that the image's random numbers depend on, in any process and any order."""

    seed: int
    """Seed of the loader."""
    epoch: int
    """Number of the epoch, from 0."""
    image: int
    """Number that identifies the image."""

    def generator(self) -> np.random.Generator:
        """Return a generator for this image and epoch.

        It is counter-based (Philox), so creating one for each image needs no warm-up.
        """
        key = np.array([self.seed % 2**64, self.epoch], dtype=np.uint64)
        # The lowest word of the counter counts the numbers drawn.
        return np.random.Generator(np.random.Philox(key=key, counter=[0, self.image, 0, 0]))


class Draws(NamedTuple):
    """The images of a batch, with the rest that their random numbers depend on."""

    seed: int
    """Seed of the loader."""
    epoch: int
    """Number of the epoch, from 0."""
    images: Tensor
    """Numbers that identify the images: (B,), int64."""
