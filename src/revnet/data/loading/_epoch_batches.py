"""Batches of images that can be read in any order: an epoch's order is a function of seed and epoch alone."""

import zlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
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
        weights: Weight of each image, (N,). The images of an epoch are drawn with these weights, with replacement, and
            the numbers of an image that is drawn again are larger by multiples of `num_images`. None takes every image
            once.
    """

    def __init__(
        self,
        num_images: int,
        *,
        batch_size: int,
        drop_last: bool,
        shuffle: bool,
        seed: int,
        share: Share,
        weights: Tensor | None = None,
    ) -> None:
        self._num_images = num_images
        self._batches = share.global_batches(num_images, batch_size, drop_last=drop_last)
        bounds = [0, *(batch.stop for batch in self._batches)]
        self._shuffle = shuffle
        self._weights = weights
        self._seed = seed
        self.share = share
        self._first = 0
        order = {"seed": seed, "batch_size": batch_size, "num_images": num_images}
        if weights is not None:
            order["weights"] = zlib.crc32(weights.numpy().tobytes())
        self.position = Position(bounds, share.num_parts, order)

    def __len__(self) -> int:
        return len(self._batches) * self.share.num_parts

    def __iter__(self) -> Iterator[Draws]:
        epoch = self.position.epoch
        generator = torch.Generator().manual_seed(self._seed + epoch)
        if self._weights is not None:
            images = _number_repeats(
                torch.multinomial(self._weights, self._num_images, replacement=True, generator=generator),
                self._num_images,
            )
        elif self._shuffle:
            # The order that PyTorch's DistributedSampler has for one process.
            images = torch.randperm(self._num_images, generator=generator)
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


def _number_repeats(images: Tensor, num_images: int) -> Tensor:
    """Add `num_images` to the second occurrence of a number, twice that to the third, and so on.

    Random numbers of an image then differ between its occurrences.
    """
    order = torch.argsort(images, stable=True)
    ascending = images[order]
    positions = torch.arange(len(images))
    is_first = torch.ones_like(ascending, dtype=torch.bool)
    is_first[1:] = ascending[1:] != ascending[:-1]
    firsts = torch.where(is_first, positions, 0).cummax(0).values
    repeats = torch.empty_like(images)
    repeats[order] = positions - firsts
    return images + num_images * repeats


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
        return DecodedBatch(*self._split.__getitems__(draws.images % len(self._split)), draws.images)
