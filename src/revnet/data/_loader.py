"""Batches of a split that lies in memory."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from revnet.data._base import ImageSplit


def make_loader(
    split: ImageSplit,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    drop_last: bool = False,
    pin_memory: bool = False,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Cut a split into batches of (images, labels), uint8 (B, C, H, W) and int64 (B,).

    The order of an epoch is a function of `seed` and the epoch's number alone, which `loader.sampler.set_epoch` sets
    (Lightning calls it). So a run that resumes at an epoch sees the batches that it would have seen, and nothing is
    drawn from PyTorch's global generator. There are no worker processes: a batch is one indexing operation.

    Args:
        split: The images.
        batch_size: Images a batch; the last one is smaller unless `drop_last`.
        shuffle: A new order each epoch; otherwise the order of the split.
        seed: Which orders.
        drop_last: Leave out the last batch when it is not full.
        pin_memory: Put batches into page-locked memory, for faster copies to a GPU.

    Raises:
        ValueError: `batch_size` is not positive, or `drop_last` would leave no batch.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` (={batch_size}) must be positive; pass 100, for instance.")
    if drop_last and batch_size > len(split):
        raise ValueError(
            f"`batch_size` (={batch_size}) must not exceed the {len(split)} images of the split with `drop_last`, "
            "which would leave no batch; lower it, or keep the last batch."
        )
    sampler: DistributedSampler[tuple[Tensor, Tensor]] | None = None
    if shuffle:
        # Made for several processes; with one, it is PyTorch's shuffle whose order depends on (seed, epoch) alone.
        sampler = DistributedSampler(split, num_replicas=1, rank=0, seed=seed)
    return DataLoader(
        split,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=_as_is,
        drop_last=drop_last,
        pin_memory=pin_memory,
        # Without its own generator, every new iterator draws a number from the global one.
        generator=torch.Generator().manual_seed(seed),
    )


def _as_is(batch: Any) -> Any:
    return batch
