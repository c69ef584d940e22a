"""The order of an epoch, as a function of only the seed and the epoch number."""

from collections.abc import Iterator, Sized

from torch.utils.data import DistributedSampler, Sampler

from revnet.data.decoding.image_draw import Draw


class EpochSampler(Sampler[Draw]):
    """Sampler that yields each index together with the seed and the epoch, so that workers keep no state.

    Args:
        split: The images.
        shuffle: Whether each epoch has a new order; otherwise indices ascend.
        seed: Seed of the orders.
    """

    def __init__(self, split: Sized, *, shuffle: bool, seed: int) -> None:
        # Used with one replica, because its shuffle depends only on (seed, epoch).
        self._order: DistributedSampler[int] = DistributedSampler(
            split,  # type: ignore[arg-type]  # only its length is used
            num_replicas=1,
            rank=0,
            shuffle=shuffle,
            seed=seed,
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, initially 0. Lightning calls it."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Draw]:
        seed, epoch = self._order.seed, self._order.epoch
        return (Draw(seed, epoch, image) for image in self._order)
