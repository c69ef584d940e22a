"""What a data set is: two splits of labelled images, held in memory, and the names of the classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from revnet.data._optional import require


@dataclass(frozen=True, eq=False, repr=False)
class ImageSplit(Dataset[tuple[Tensor, Tensor]]):
    """One part of a data set.

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


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A data set for classification, split into training and test images.

    Raises:
        ValueError: The splits hold images of different shapes, or a label has no class name.
    """

    name: str
    """How the data set is called in logs and file names, such as `digits` or `cifar10`."""
    train: ImageSplit
    """The images to learn from."""
    test: ImageSplit
    """The images to be looked at once, at the end."""
    class_names: tuple[str, ...]
    """The name of each class; a label is an index into it."""

    def __post_init__(self) -> None:
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise ValueError(
                f"`test` (={_describe(self.test.images)}) must hold images of the same shape as `train` "
                f"(={_describe(self.train.images)}); resize one of them."
            )
        for part, split in (("train", self.train), ("test", self.test)):
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
        return self.train.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image."""
        height, width = self.train.images.shape[2:]
        return height, width

    def holdout(self, fraction: float, seed: int) -> tuple[ImageSplit, ImageSplit]:
        """Set a part of the training images aside for validation; the test split is not touched.

        The split is stratified: every class gives the same share, to the nearest image. It depends on `fraction`,
        `seed` and the labels alone, and keeps the order of the images in both parts.

        Args:
            fraction: Share of the training images that goes to validation, rounded up to whole images.
            seed: Which images go.

        Returns:
            The training part and the validation part.

        Raises:
            ValueError: `fraction` is not between 0 and 1, or one of the parts would have fewer images than there are
                classes, or `seed` is not in 0..2^32 - 1.
            MissingDependencyError: scikit-learn is not installed.
        """
        if not 0 < fraction < 1:
            raise ValueError(
                f"`fraction` (={fraction}) must lie between 0 and 1, both excluded; "
                "pass 0.1 to hold out a tenth of the training images."
            )
        selection = require("sklearn.model_selection", package="scikit-learn", purpose="holding out a validation part")
        labels = self.train.labels.numpy()
        try:
            parts = selection.train_test_split(
                range(len(labels)), test_size=float(fraction), random_state=seed, stratify=labels
            )
        except ValueError as error:
            raise ValueError(
                f"`fraction` (={fraction}) and `seed` (={seed}) do not split {len(labels)} images of "
                f"{self.num_classes} classes: {str(error).rstrip('.')}; pass another fraction or seed."
            ) from error
        train, validation = (ImageSplit(*self.train.__getitems__(sorted(part))) for part in parts)
        return train, validation


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
