"""Images in files, each decoded when its batch is built."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from revnet.data.decoding.batch import DecodedBatch, EncodedImage, decode_batch
from revnet.data.decoding.corrupt import OnCorrupt, check_image_size, check_on_corrupt, corrupt_error
from revnet.data.decoding.crop import AbstractCrop, CenterCrop
from revnet.data.decoding.decode import require_pillow
from revnet.data.decoding.image_draw import Draw
from revnet.data.splits._holdout import stratified_parts
from revnet.data.splits.abstract_split import AbstractSplit


class FileSplit(AbstractSplit, Dataset[tuple[Tensor, Tensor]]):
    """Images in files of any size and kind, decoded to RGB of one size.

    Args:
        files: Paths of the images.
        labels: Class of each image: (N,), int64.
        image_size: Height and width of the decoded images.
        crop: Rule that chooses the part of an image that is kept.
        on_corrupt: Handling of an image that cannot be decoded: "stop" raises a DataError, "skip" leaves the image
            out of its batch and logs it once.

    Raises:
        ValueError: `files` is empty, the number of labels differs, or an option is out of range.
        MissingDependencyError: Pillow is not installed.
    """

    labels: Tensor

    def __init__(
        self,
        files: Iterable[str | Path | bytes],
        labels: Tensor,
        *,
        image_size: int,
        crop: AbstractCrop,
        on_corrupt: OnCorrupt = "stop",
    ) -> None:
        # One array: with a list of a million strings, forked workers would copy it page by page as they count
        # references to its elements.
        self._files = np.array([os.fsencode(file) for file in files])
        if len(self) == 0:
            raise ValueError("`files` (=[]) must not be empty; pass at least one image.")
        if labels.dtype != torch.int64 or labels.shape != (len(self),):
            raise ValueError(
                f"`labels` (of shape {tuple(labels.shape)}, {labels.dtype}) must be int64 of shape ({len(self)},), "
                "one label per file; pass `labels.long()` of the same length."
            )
        check_image_size(image_size)
        check_on_corrupt(on_corrupt)
        require_pillow()
        self.labels = labels
        self.crop = crop
        self.on_corrupt = on_corrupt
        self.skipped: set[str] = set()
        """Names of the images that have been left out so far, in this process."""
        self._side = image_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels (always 3), height and width of the decoded images."""
        return 3, self._side, self._side

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        return f"FileSplit({len(self)} files, image_size={self._side}, crop={self.crop})"

    def file(self, index: int) -> str:
        """Return the path of an image."""
        return os.fsdecode(self._files[index])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one image and its label, with the random crop of seed 0 in the first epoch.

        Raises:
            DataError: The image cannot be decoded.
        """
        images, labels, _, corrupt, _ = self.__getitems__([Draw(0, 0, range(len(self))[index])])
        if corrupt:
            raise corrupt_error(*corrupt[0])
        return images[0], labels[0]

    def __getitems__(self, draws: Sequence[Draw]) -> DecodedBatch:
        """Read and decode a batch."""
        rows = [
            EncodedImage(file := self.file(draw.image), f"'{file}'", int(self.labels[draw.image]), draw)
            for draw in draws
        ]
        return decode_batch(rows, self.crop, self.image_shape[1:])

    def holdout(self, fraction: float, seed: int) -> tuple["FileSplit", "FileSplit"]:
        """Hold out a part of the images, see `ImageDataset.holdout`."""
        training, validation = stratified_parts(self.labels, fraction, seed)
        return self._part(training, self.crop), self._part(validation, CenterCrop())

    def _part(self, indices: list[int], crop: AbstractCrop) -> "FileSplit":
        return FileSplit(
            self._files[indices], self.labels[indices], image_size=self._side, crop=crop, on_corrupt=self.on_corrupt
        )
