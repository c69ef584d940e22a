"""The order of an epoch, as a function of the seed and the epoch's number alone."""

from __future__ import annotations

from collections.abc import Iterator, Sized

from torch.utils.data import DistributedSampler, Sampler

from revnet.data._crop import Draw


class EpochSampler(Sampler[Draw]):
    """Hands out each index with the seed and the epoch, so that workers keep no state of their own.

    Args:
        split: What is indexed.
        shuffle: A new order each epoch; otherwise ascending.
        seed: Which orders.
    """

    def __init__(self, split: Sized, *, shuffle: bool, seed: int) -> None:
        # Made for several processes; with one, it is PyTorch's shuffle whose order depends on (seed, epoch) alone.
        self._order: DistributedSampler[int] = DistributedSampler(
            split,  # type: ignore[arg-type]  # its length is all that is asked for
            num_replicas=1,
            rank=0,
            shuffle=shuffle,
            seed=seed,
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is of; 0 until then. Lightning calls it."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Draw]:
        seed, epoch = self._order.seed, self._order.epoch
        return (Draw(seed, epoch, image) for image in self._order)
