"""What a data set is: a training and a test split of labelled images, and the names of the classes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from revnet.data._holdout import stratified_parts


class AbstractSplit(ABC):
    """One part of a data set, wherever its images are; `make_loader` cuts any of them into batches."""

    labels: Tensor | None
    """The class of each image: (N,), int64. None where it is told only as the images come."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that come out."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def holdout(self, fraction: float, seed: int) -> tuple[Self, Self]:
        """Set a part of the images aside, see `ImageDataset.holdout`."""


@dataclass(frozen=True, eq=False, repr=False)
class ImageSplit(AbstractSplit, Dataset[tuple[Tensor, Tensor]]):
    """Images in memory, as one tensor.

    It is a PyTorch `Dataset` of (image, label) pairs. A `DataLoader` that hands it a whole list of indices gets the
    batch back from one indexing operation: pass a `collate_fn` that returns its argument, as `make_loader` does.

    Raises:
        ValueError: A tensor has another type or shape than stated, the lengths differ, or there is no image.
    """

    images: Tensor
    """The pixels, 0 to 255: (N, C, H, W), uint8."""
    labels: Tensor
    """The class of each image: (N,), int64."""

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"`images` (={_describe(self.images)}) must be uint8 of shape (N, C, H, W); "
                "add the missing dimensions with `reshape` and scale the pixels to 0..255."
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"`labels` (={_describe(self.labels)}) must be int64 of shape ({len(self.images)},), "
                "one label an image; pass `labels.long()` of the same length."
            )
        if self.images.numel() == 0:
            raise ValueError(f"`images` (={_describe(self.images)}) must not be empty; pass at least one image.")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"ImageSplit(images={_describe(self.images)})"

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        where = torch.as_tensor(indices, dtype=torch.int64)
        return self.images[where], self.labels[where]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def holdout(self, fraction: float, seed: int) -> tuple["ImageSplit", "ImageSplit"]:
        """Set a part of the images aside, see `ImageDataset.holdout`."""
        training, validation = stratified_parts(self.labels, fraction, seed)
        return ImageSplit(*self.__getitems__(training)), ImageSplit(*self.__getitems__(validation))


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A data set for classification, split into training and test images.

    Raises:
        ValueError: The splits hold images of different shapes, or a label has no class name.
    """

    name: str
    """How the data set is called in logs and file names, such as `digits` or `cifar10`."""
    train: AbstractSplit
    """The images to learn from."""
    test: AbstractSplit
    """The images to be looked at once, at the end."""
    class_names: tuple[str, ...]
    """The name of each class; a label is an index into it."""

    def __post_init__(self) -> None:
        if self.train.image_shape != self.test.image_shape:
            raise ValueError(
                f"`test` (with images of {self.test.image_shape}) must hold images of the same shape as `train` "
                f"(with images of {self.train.image_shape}); resize one of them."
            )
        for part, split in (("train", self.train), ("test", self.test)):
            if split.labels is None:
                continue
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"`{part}` (with labels {low}..{high}) must have labels in 0..{self.num_classes - 1}, one for "
                    f"each of the {self.num_classes} `class_names`; name every class."
                )

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not an image of each is there."""
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        """Channels of an image: 1 for grey, 3 for colour."""
        return self.train.image_shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.train.image_shape[1:]

    def holdout(self, fraction: float, seed: int) -> tuple[AbstractSplit, AbstractSplit]:
        """Set a part of the training images aside for validation; the test split is not touched.

        The split is stratified: every class gives the same share, to the nearest image. It depends on `fraction`,
        `seed` and the labels alone, and keeps the order of the images in both parts. Where training images are cropped
        at random, those for validation are cropped like test images.

        Args:
            fraction: Share of the training images that goes to validation, rounded up to whole images.
            seed: Which images go.

        Returns:
            The training part and the validation part, of the kind of `train`.

        Raises:
            ValueError: `fraction` is not between 0 and 1, or one of the parts would have fewer images than there are
                classes, or `seed` is not in 0..2^32 - 1, or the training images come as a stream.
            MissingDependencyError: scikit-learn is not installed.
        """
        return self.train.holdout(fraction, seed)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
