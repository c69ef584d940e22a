"""Images in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from revnet.data.splits._holdout import stratified_parts
from revnet.data.splits.abstract_split import AbstractSplit


@dataclass(frozen=True, eq=False, repr=False)
class ImageSplit(AbstractSplit, Dataset[tuple[Tensor, Tensor]]):
    """Images in memory, as one tensor.

    A split is a PyTorch `Dataset` of (image, label) pairs. A `DataLoader` that passes it a whole list of indices gets
    the batch from one indexing operation; pass a `collate_fn` that returns its argument, as `make_loader` does.

    Raises:
        ValueError: A tensor has the wrong dtype or shape, the lengths differ, or `images` is empty.
    """

    images: Tensor
    """Pixels, 0 to 255: (N, C, H, W), uint8."""
    labels: Tensor
    """Class of each image: (N,), int64."""

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"`images` (={_describe(self.images)}) must be uint8 of shape (N, C, H, W); "
                "add the missing dimensions with `reshape` and scale the pixels to 0..255."
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"`labels` (={_describe(self.labels)}) must be int64 of shape ({len(self.images)},), "
                "one label per image; pass `labels.long()` of the same length."
            )
        if self.images.numel() == 0:
            raise ValueError(f"`images` (={_describe(self.images)}) must not be empty; pass at least one image.")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"ImageSplit(images={_describe(self.images)})"

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return self.images[chosen], self.labels[chosen]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def holdout(self, fraction: float, seed: int) -> tuple["ImageSplit", "ImageSplit"]:
        """Hold out a part of the images, see `ImageDataset.holdout`."""
        training, validation = stratified_parts(self.labels, fraction, seed)
        return ImageSplit(*self.__getitems__(training)), ImageSplit(*self.__getitems__(validation))


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
