"""The interface of a random transform."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn


class AbstractTransform(nn.Module, ABC):
    """A random transform of a batch of images, as a function of the images and of random numbers.

    It acts in evaluation mode too; `make_augment` disables it there.
    """

    num_draws: ClassVar[int]
    """Number of random numbers for each image."""

    @abstractmethod
    def forward(self, images: Tensor, draws: Tensor) -> Tensor:
        """Transform a batch.

        Args:
            images: (B, C, H, W).
            draws: Random numbers, uniform in [0, 1): (B, num_draws), on the device of the images.

        Returns:
            The transformed images: (B, C, H, W).
        """
