"""Images in files, each decoded when its batch is made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from revnet.data._base import AbstractSplit
from revnet.data._batch import (
    Decoded,
    Encoded,
    OnCorrupt,
    check_image_size,
    check_on_corrupt,
    corrupt_error,
    decode_batch,
)
from revnet.data._crop import AbstractCrop, CentreCrop, Draw
from revnet.data._decode import require_pillow
from revnet.data._holdout import stratified_parts


class FileSplit(AbstractSplit, Dataset[tuple[Tensor, Tensor]]):
    """Images in files of any size and kind, which become RGB of one size.

    Args:
        files: Their paths.
        labels: The class of each: (N,), int64.
        image_size: Height and width that they are brought to.
        crop: Which part of an image is kept.
        on_corrupt: What to do about an image that cannot be decoded: "stop" raises a DataError, "skip" leaves it out of
            its batch and says so once.

    Raises:
        ValueError: There is no file, or there are other than one label for each, or an option is out of range.
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
        # One array: a list of a million strings is copied, page by page, into every forked worker that counts a
        # reference to one of them.
        self._files = np.array([os.fsencode(file) for file in files])
        if len(self) == 0:
            raise ValueError("`files` (=[]) must not be empty; pass at least one image.")
        if labels.dtype != torch.int64 or labels.shape != (len(self),):
            raise ValueError(
                f"`labels` (of shape {tuple(labels.shape)}, {labels.dtype}) must be int64 of shape ({len(self)},), "
                "one label a file; pass `labels.long()` of the same length."
            )
        check_image_size(image_size)
        check_on_corrupt(on_corrupt)
        require_pillow()
        self.labels = labels
        self.crop = crop
        self.on_corrupt = on_corrupt
        self.skipped: set[str] = set()
        """The names of the images that were left out so far, in this process."""
        self._side = image_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels (always 3), height and width of the images that come out."""
        return 3, self._side, self._side

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        return f"FileSplit({len(self)} files, image_size={self._side}, crop={self.crop})"

    def file(self, index: int) -> str:
        """The path of an image."""
        return os.fsdecode(self._files[index])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image and its label, with the random crop that seed 0 draws in the first epoch.

        Raises:
            DataError: It cannot be decoded.
        """
        images, labels, corrupt, _ = self.__getitems__([Draw(0, 0, range(len(self))[index])])
        if corrupt:
            raise corrupt_error(*corrupt[0])
        return images[0], labels[0]

    def __getitems__(self, draws: Sequence[Draw]) -> Decoded:
        """Read and decode a batch."""
        rows = [
            Encoded(file := self.file(draw.image), f"'{file}'", int(self.labels[draw.image]), draw) for draw in draws
        ]
        return decode_batch(rows, self.crop, self.image_shape[1:])

    def holdout(self, fraction: float, seed: int) -> tuple[FileSplit, FileSplit]:
        """Set a part of the images aside, see `ImageDataset.holdout`."""
        training, validation = stratified_parts(self.labels, fraction, seed)
        return self._part(training, self.crop), self._part(validation, CentreCrop())

    def _part(self, indices: list[int], crop: AbstractCrop) -> FileSplit:
        return FileSplit(
            self._files[indices], self.labels[indices], image_size=self._side, crop=crop, on_corrupt=self.on_corrupt
        )
