"""The interface of a split."""

from abc import ABC, abstractmethod
from typing import Self

from torch import Tensor


class AbstractSplit(ABC):
    """One part of a data set, with images stored anywhere; `make_loader` cuts any of them into batches."""

    labels: Tensor | None
    """Class of each image: (N,), int64. None if labels become known only as the images are read."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def holdout(self, fraction: float, seed: int) -> tuple[Self, Self]:
        """Hold out a part of the images, see `ImageDataset.holdout`."""
