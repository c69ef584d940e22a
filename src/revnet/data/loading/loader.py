"""Batches of a split of any kind."""

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from revnet._units import counted
from revnet.data._random_keys import image_keys
from revnet.data.decoding.corrupt import corrupt_error, log_skipped
from revnet.data.loading._abstract_batches import AbstractBatches
from revnet.data.loading._epoch_batches import EpochBatches, ImageBatches
from revnet.data.loading._share import Share
from revnet.data.loading._shared_memory import (
    PREFETCH_FACTOR,
    SECONDS_PER_BATCH,
    check_shared_memory,
    end_if_batches_are_lost,
)
from revnet.data.loading._stream_batches import StreamBatches
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.data.splits.file_split import FileSplit
from revnet.data.splits.image_split import ImageSplit
from revnet.data.splits.stream_split import StreamSplit
from revnet.errors import DataError

# (images, labels), or (images, labels, keys) if keys were requested: a type that callers can unpack in both ways.
Batch = Any


class Loader(Iterable[Batch]):
    """Batches of (images, labels), or of (images, labels, keys), as returned by `make_loader`.

    Lightning's Trainer accepts it like a `DataLoader`, sets the epoch of its `sampler`, and keeps its position in
    checkpoints.
    """

    batch_sampler = None  # Lightning looks for this too where there is a `sampler`

    def __init__(
        self,
        split: AbstractSplit,
        batches: AbstractBatches,
        workers: DataLoader[Any],
        make_keys: Callable[[int, Tensor], Tensor] | None,
        batch_size: int,
    ) -> None:
        self._split = split
        self._batches = batches
        self._workers = workers
        self._make_keys = make_keys
        self._batch_size = batch_size  # of this process, at most

    @property
    def sampler(self) -> AbstractBatches:
        """The object whose `set_epoch` sets the epoch of the next iteration."""
        return self._batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        if self._workers._iterator is None:  # the workers are about to start
            check_shared_memory(self._workers.num_workers, self._batch_size, self._split.image_shape)
        try:
            yield from self._decodable()
        except DataError:
            # Now, and not when the garbage collector frees the traceback that holds this loader.
            self.close()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the epoch, and the updates of it whose batches were all handed out.

        A batch counts once it is handed out, so save the position when its update is complete. Batches that workers
        have read ahead do not count. The state consists of plain numbers and fits any number of processes and of parts,
        except near the end of an epoch without `drop_last`, where the batches depend on the number of processes.
        """
        return self._batches.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a position: the next iteration yields the rest of its epoch, unless another epoch is set first.

        Raises:
            ValueError: The position is from a loader with another order, or no batch of this loader begins there.
        """
        self._batches.load_state_dict(state_dict)

    def _decodable(self) -> Iterator[Batch]:
        is_empty = True
        for images, labels, numbers, corrupt, fatal in self._batches.follow(self._workers):
            for name, reason in corrupt:
                self._handle(name, reason)
            if fatal is not None:
                raise DataError(fatal)
            if len(labels):
                is_empty = False
                yield images, labels, *self._keys(numbers)
        if is_empty and self._batches.position.num_left_out == 0:
            raise DataError("no image of the split can be decoded; restore the files.")

    def _keys(self, numbers: Tensor) -> tuple[Tensor, ...]:
        return () if self._make_keys is None else (self._make_keys(self._batches.position.epoch, numbers),)

    def _handle(self, name: str, reason: str) -> None:
        """Raise or log, in this process, a failure that a worker reports."""
        assert isinstance(self._split, FileSplit | StreamSplit)
        if self._split.on_corrupt == "stop":
            raise corrupt_error(name, reason)
        if name not in self._split.skipped:
            self._split.skipped.add(name)
            log_skipped(name, reason)

    def close(self) -> None:
        """End the worker processes; another iteration starts new ones."""
        if self._workers._iterator is not None:
            self._workers._iterator._shutdown_workers()  # type: ignore[attr-defined]  # PyTorch offers no public way
            self._workers._iterator = None

    # Lightning ends the worker processes of a `DataLoader` through this attribute when a fit is over.

    @property
    def _iterator(self) -> Any:
        return self._workers._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._workers._iterator = value


def make_loader(
    split: AbstractSplit,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    drop_last: bool = False,
    rank: int = 0,
    num_processes: int = 1,
    num_parts: int = 1,
    keys: bool = False,
    weights: Tensor | None = None,
    pin_memory: bool = False,
    num_workers: int = 0,
) -> Loader:
    """Cut a split into batches of (images, labels), uint8 (B, C, H, W) and int64 (B,), and keys if requested.

    The order of an epoch and its random crops are a function of only `seed` and the epoch number, which
    `loader.sampler.set_epoch` sets (Lightning calls it), and nothing is drawn from PyTorch's global generator. The
    order of a stream also depends on `num_workers`, since workers share its shards; its crops do not.

    Several processes divide each batch: process `rank` takes the slice of that number, so that all of them together see
    the batches of a single process. With `drop_last`, the slices are equal. Without it, nothing is left out or read
    twice, the sizes of the slices differ by at most one image, and every process yields the same number of batches,
    none of them empty. Each process reads a whole stream, but decodes only its own slices.

    `loader.state_dict` and `load_state_dict` save and restore the position within an epoch, and Lightning calls them: a
    run that is resumed after any update sees the same batches as an uninterrupted run, on any number of processes.
    Without `drop_last`, batches depend on that number if fewer images than processes are left at the end, or if there
    are more processes than images in a batch; a position where no batch of the new loader begins is refused. The
    position of a stream leaves out rows without decoding them, and needs the same `num_workers`. It is exact as long as
    the rows come in the same order, which a stream from the hub keeps only with the same files there and the same
    version of `datasets`.

    Args:
        split: The images.
        batch_size: Images per batch of all processes together. The last batch is smaller unless `drop_last`, and so is
            a batch with skipped images.
        shuffle: Whether each epoch has a new order; otherwise batches follow the order of the split.
        seed: Seed of the orders and crops.
        drop_last: Whether to leave out the last batch if it is not full.
        rank: Number of this process, from 0.
        num_processes: Number of processes that divide each batch.
        num_parts: Number of consecutive batches to cut a process's slice into, to accumulate their gradients; needs
            `drop_last` unless it is 1.
        keys: Whether to yield (images, labels, keys). The keys, int64 (B,), determine the random numbers of the
            transforms. They are a function of seed, epoch and image, so any number of processes, and a resumed run,
            augment an image in the same way. Without `shuffle`, they are the same in every epoch, so that epochs can be
            compared.
        weights: Weight of each image, (N,), floating point. Every epoch draws its images at random with these weights,
            with replacement, so that rare classes can come as often as others. None takes each image once. Not for a
            stream.
        pin_memory: Whether to put batches into page-locked memory, for faster copies to a GPU.
        num_workers: Number of processes that decode images, which stay alive between epochs; 0 decodes in this process.
            Not used for images in memory, where a batch is one indexing operation.

    Raises:
        ValueError: A number is out of range, `weights` do not fit the split, `drop_last` would leave no batch, a batch
            cannot be divided into equal parts, or there are fewer images than processes.
        TypeError: `split` is not a split of an `ImageDataset`.
        DataError: While iterating, if an image cannot be decoded and the data set was loaded with
            `on_corrupt="stop"`, or if no image of a slice can be decoded.
    """
    share = Share(rank, num_processes, num_parts)
    _check(split, batch_size, drop_last, num_workers, share)
    _check_weights(split, weights)
    make_keys = partial(_make_keys, seed=seed, is_shuffled=shuffle, pin_memory=pin_memory) if keys else None
    part_size = -(-batch_size // (num_processes * num_parts))
    if isinstance(split, StreamSplit):
        num_workers = min(num_workers, split.rows.num_shards)
        stream = StreamBatches(
            split,
            batch_size=batch_size,
            drop_last=drop_last,
            shuffle=shuffle,
            seed=seed,
            share=share,
            num_workers=num_workers,
        )
        options = _options(num_workers, pin_memory, seed)
        return Loader(split, stream, DataLoader(stream, batch_size=None, **options), make_keys, part_size)
    if not isinstance(split, ImageSplit | FileSplit):
        raise TypeError(f"`split` (of {type(split)}) must be a split of an `ImageDataset`; pass `dataset.train`, say.")
    batches = EpochBatches(
        len(split),
        batch_size=batch_size,
        drop_last=drop_last,
        shuffle=shuffle,
        seed=seed,
        share=share,
        weights=weights,
    )
    options = _options(0 if isinstance(split, ImageSplit) else num_workers, pin_memory, seed)
    # `ImageBatches` gets what the batch sampler yields as it is, so that need not be a list.
    workers: DataLoader[Any] = DataLoader(ImageBatches(split), batch_sampler=batches, **options)  # type: ignore[arg-type]
    return Loader(split, batches, workers, make_keys, part_size)


def _check_weights(split: AbstractSplit, weights: Tensor | None) -> None:
    if weights is None:
        return
    if isinstance(split, StreamSplit):
        raise ValueError("`weights` are not for a stream, whose images come one after the other; pass None.")
    if weights.shape != (len(split),) or not weights.is_floating_point():
        raise ValueError(
            f"`weights` (of shape {tuple(weights.shape)}, {weights.dtype}) must be floating point of shape "
            f"({len(split)},), one for each image."
        )
    if not (weights >= 0).all() or not weights.sum().isfinite() or not weights.any():
        raise ValueError("`weights` must be finite, 0 or more, and not all 0.")


def _check(split: AbstractSplit, batch_size: int, drop_last: bool, num_workers: int, share: Share) -> None:
    if batch_size < 1:
        raise ValueError(f"`batch_size` (={batch_size}) must be positive; pass 100, for instance.")
    if num_workers < 0:
        raise ValueError(f"`num_workers` (={num_workers}) must not be negative; pass 0 to decode in this process.")
    if drop_last and batch_size > len(split):
        raise ValueError(
            f"`batch_size` (={batch_size}) must not exceed the {counted(len(split), 'image')} of the split with "
            "`drop_last`, which would leave no batch; lower it, or keep the last batch."
        )
    if drop_last:
        share.check_batch_size(batch_size)
    elif share.num_parts > 1:
        raise ValueError(
            f"`num_parts` (={share.num_parts}) needs `drop_last`, since the last batch may be too small to be divided; "
            "pass `drop_last=True`, or 1."
        )
    share.check_num_samples(len(split), "images of the split")


def _make_keys(epoch: int, numbers: Tensor, *, seed: int, is_shuffled: bool, pin_memory: bool) -> Tensor:
    keys = image_keys(seed, epoch if is_shuffled else 0, numbers)
    return keys.pin_memory() if pin_memory else keys


def _options(num_workers: int, pin_memory: bool, seed: int) -> dict[str, Any]:
    return {
        "collate_fn": _identity,
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "timeout": SECONDS_PER_BATCH if num_workers > 0 else 0,
        "prefetch_factor": PREFETCH_FACTOR if num_workers > 0 else None,
        "persistent_workers": num_workers > 0,  # starting one takes as long as decoding hundreds of images
        "worker_init_fn": _start_worker,
        # Without its own generator, every new iterator draws a number from the global one.
        "generator": torch.Generator().manual_seed(seed),
    }


def _start_worker(_worker: int) -> None:
    end_if_batches_are_lost()
    # Ctrl-C reaches every process of a terminal, and SIGTERM every process of a job. The main process ends the workers,
    # perhaps after a last batch; each of them would print a traceback otherwise.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_next_time)


def _end_next_time(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def _identity(batch: Any) -> Any:
    return batch
