"""Images that arrive one after the other, from shards on disk or from the network."""

from typing import NoReturn

from torch import Tensor

from revnet.data.decoding.corrupt import OnCorrupt, check_image_size, check_on_corrupt
from revnet.data.decoding.crop import AbstractCrop
from revnet.data.decoding.decode import require_pillow
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.data.splits.rows import AbstractRows


class StreamSplit(AbstractSplit):
    """Images of any size and kind that can be read in order only, decoded to RGB of one size.

    Args:
        rows: Source of the images.
        num_images: Number of images.
        num_classes: Number of classes; labels are in 0..num_classes - 1.
        image_size: Height and width of the decoded images.
        crop: Rule that chooses the part of an image that is kept.
        on_corrupt: Handling of an image that cannot be decoded: "stop" raises a DataError, "skip" leaves the image
            out of its batch and logs it once.
        labels: Class of each image, if the classes are known in advance.

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
        """Names of the images that have been left out so far, in this process."""
        self.labels = labels
        self._num_images = num_images
        self._side = image_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels (always 3), height and width of the decoded images."""
        return 3, self._side, self._side

    def __len__(self) -> int:
        return self._num_images

    def __repr__(self) -> str:
        return f"StreamSplit({len(self)} images, image_size={self._side}, crop={self.crop})"

    def holdout(self, fraction: float, seed: int) -> NoReturn:
        """Raise: a stream can only be read in order, so no part of it can be held out.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"`fraction` (={fraction}) cannot be held out of images that come as a stream; train on all of them "
            "(`val_fraction` 0), or load a folder of image files."
        )
