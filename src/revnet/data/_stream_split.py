"""Images that come one after the other, from shards on disk or from the network."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from revnet.data._base import AbstractSplit
from revnet.data._batch import OnCorrupt, check_image_size, check_on_corrupt
from revnet.data._crop import AbstractCrop
from revnet.data._decode import require_pillow
from revnet.data._rows import AbstractRows


class StreamSplit(AbstractSplit):
    """Images that can be read in order only, of any size and kind, which become RGB of one size.

    Args:
        rows: Where they come from.
        num_images: How many come.
        num_classes: Labels lie in 0..num_classes - 1.
        image_size: Height and width that images are brought to.
        crop: Which part of an image is kept.
        on_corrupt: What to do about an image that cannot be decoded: "stop" raises a DataError, "skip" leaves it out of
            its batch and says so once.
        labels: The class of each, if they can be known beforehand.

    Raises:
        ValueError: An option is out of range.
        MissingDependencyError: Pillow is not installed.
    """

    def __init__(
        self,
        rows: AbstractRows,
        *,
        num_images: int,
        num_classes: int,
        image_size: int,
        crop: AbstractCrop,
        on_corrupt: OnCorrupt = "stop",
        labels: Tensor | None = None,
    ) -> None:
        check_image_size(image_size)
        check_on_corrupt(on_corrupt)
        require_pillow()
        self.rows = rows
        self.num_classes = num_classes
        self.crop = crop
        self.on_corrupt = on_corrupt
        self.skipped: set[str] = set()
        """The names of the images that were left out so far, in this process."""
        self.labels = labels
        self._num_images = num_images
        self._side = image_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels (always 3), height and width of the images that come out."""
        return 3, self._side, self._side

    def __len__(self) -> int:
        return self._num_images

    def __repr__(self) -> str:
        return f"StreamSplit({len(self)} images, image_size={self._side}, crop={self.crop})"

    def holdout(self, fraction: float, seed: int) -> NoReturn:
        """Not for a stream, of which no part can be had without reading the rest.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"`fraction` (={fraction}) cannot be held out of images that come as a stream; train on all of them "
            "(`val_fraction` 0), or load a folder of image files."
        )
