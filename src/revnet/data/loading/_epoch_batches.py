"""Batches of images that can be read in any order: an epoch's order is a function of seed and epoch alone."""

from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import Dataset, Sampler

from revnet.data.decoding.batch import DecodedBatch
from revnet.data.decoding.image_draw import Draw, Draws
from revnet.data.loading._abstract_batches import AbstractBatches
from revnet.data.loading._position import Position
from revnet.data.loading._share import Share
from revnet.data.splits.file_split import FileSplit
from revnet.data.splits.image_split import ImageSplit


class EpochBatches(AbstractBatches, Sampler[Draws]):
    """The batches of one process, as numbers of images with seed and epoch, so that workers keep no state.

    Args:
        num_images: Number of images.
        batch_size: Images per global batch.
        drop_last: Whether to leave out the last global batch if it is not full.
        shuffle: Whether each epoch has a new order; otherwise numbers ascend.
        seed: Seed of the orders.
        share: Part of every global batch that this process reads.
    """

    def __init__(
        self, num_images: int, *, batch_size: int, drop_last: bool, shuffle: bool, seed: int, share: Share
    ) -> None:
        self._num_images = num_images
        self._batches = share.global_batches(num_images, batch_size, drop_last=drop_last)
        self._shuffle = shuffle
        self._seed = seed
        self.share = share
        self._first = 0
        order = {"seed": seed, "batch_size": batch_size, "num_images": num_images}
        self.position = Position(len(self._batches), share.num_parts, order)

    def __len__(self) -> int:
        return len(self._batches) * self.share.num_parts

    def __iter__(self) -> Iterator[Draws]:
        epoch = self.position.epoch
        if self._shuffle:
            # The order that PyTorch's DistributedSampler has for one process.
            images = torch.randperm(self._num_images, generator=torch.Generator().manual_seed(self._seed + epoch))
        else:
            images = torch.arange(self._num_images)
        for batch in self._batches[self._first :]:
            for part in self.share.parts(batch):
                yield Draws(self._seed, epoch, images[part.start : part.stop])

    def follow(self, workers: Iterable[DecodedBatch]) -> Iterator[DecodedBatch]:
        """Yield the batches that follow the position."""
        self._first = self.position.begin()
        for batch in workers:
            yield self.hand_out(batch)


class ImageBatches(Dataset[DecodedBatch]):
    """Images in memory or in files that are read batch by batch.

    Args:
        split: The images.
    """

    def __init__(self, split: ImageSplit | FileSplit) -> None:
        self._split = split

    def __getitems__(self, draws: Draws) -> DecodedBatch:
        """Return one batch."""
        if isinstance(self._split, FileSplit):
            return self._split.__getitems__([Draw(*draws[:2], image) for image in draws.images.tolist()])
        return DecodedBatch(*self._split.__getitems__(draws.images), draws.images)
