"""Batches of a split of any kind."""

import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from revnet.data.decoding.batch import DecodedBatch
from revnet.data.decoding.corrupt import corrupt_error, log_skipped
from revnet.data.loading._epoch_sampler import EpochSampler
from revnet.data.loading._stream_batches import StreamBatches, join_remainders
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.data.splits.file_split import FileSplit
from revnet.data.splits.image_split import ImageSplit
from revnet.data.splits.stream_split import StreamSplit
from revnet.errors import DataError

Batch = tuple[Tensor, Tensor]


class _HasEpoch(Protocol):
    def set_epoch(self, epoch: int) -> None: ...


class Loader(Iterable[Batch]):
    """Batches of (images, labels), uint8 (B, C, H, W) and int64 (B,), as returned by `make_loader`.

    Lightning's Trainer accepts it like a `DataLoader`, and sets the epoch of its `sampler`.
    """

    batch_sampler = None  # Lightning looks for this too where there is a `sampler`

    def __init__(
        self,
        workers: DataLoader[Any],
        unpack: Callable[[DataLoader[Any]], Iterator[Batch]],
        sampler: _HasEpoch,
        num_batches: int,
    ) -> None:
        self._workers = workers
        self._unpack = unpack
        self._num_batches = num_batches
        self.sampler = sampler

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from self._unpack(self._workers)
        except DataError:
            # Now, and not when the garbage collector frees the traceback that holds this loader.
            self.close()
            raise

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
    pin_memory: bool = False,
    num_workers: int = 0,
) -> Loader:
    """Cut a split into batches of (images, labels), uint8 (B, C, H, W) and int64 (B,).

    The order of an epoch and its random crops are a function of only `seed` and the epoch number, which
    `loader.sampler.set_epoch` sets (Lightning calls it). A run that is resumed at an epoch therefore sees the same
    batches as an uninterrupted run, and nothing is drawn from PyTorch's global generator. The order of a stream also
    depends on `num_workers`, since workers share its shards; its crops do not.

    Args:
        split: The images.
        batch_size: Images per batch. The last batch is smaller unless `drop_last`, and so is a batch with skipped
            images.
        shuffle: Whether each epoch has a new order; otherwise batches follow the order of the split.
        seed: Seed of the orders and crops.
        drop_last: Whether to leave out the last batch if it is not full.
        pin_memory: Whether to put batches into page-locked memory, for faster copies to a GPU.
        num_workers: Number of processes that decode images, which stay alive between epochs; 0 decodes in this process.
            Not used for images in memory, where a batch is one indexing operation.

    Raises:
        ValueError: `batch_size` is not positive, `num_workers` is negative, or `drop_last` would leave no batch.
        TypeError: `split` is not a split of an `ImageDataset`.
        DataError: While iterating, if an image cannot be decoded and the data set was loaded with
            `on_corrupt="stop"`.
    """
    _check(split, batch_size, drop_last, num_workers)
    if isinstance(split, StreamSplit):
        return _stream_loader(split, batch_size, shuffle, seed, drop_last, pin_memory, num_workers)
    sampler: DistributedSampler[Batch] | EpochSampler
    unpack: Callable[[DataLoader[Any]], Iterator[Batch]]
    if isinstance(split, ImageSplit):
        num_workers = 0
        # Used with one replica, because its shuffle depends only on (seed, epoch).
        sampler = DistributedSampler(split, num_replicas=1, rank=0, shuffle=shuffle, seed=seed)
        unpack = iter
    elif isinstance(split, FileSplit):
        sampler = EpochSampler(split, shuffle=shuffle, seed=seed)
        unpack = _CorruptHandler(split)
    else:
        raise TypeError(f"`split` (of {type(split)}) must be a split of an `ImageDataset`; pass `dataset.train`, say.")
    workers = DataLoader(
        split,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        **_options(num_workers, pin_memory, seed),
    )
    return Loader(workers, unpack, sampler, _num_batches(split, batch_size, drop_last))


def _stream_loader(
    split: StreamSplit,
    batch_size: int,
    shuffle: bool,
    seed: int,
    drop_last: bool,
    pin_memory: bool,
    num_workers: int,
) -> Loader:
    batches = StreamBatches(split, batch_size=batch_size, shuffle=shuffle, seed=seed)
    num_workers = min(num_workers, split.rows.num_shards)
    workers = DataLoader(batches, batch_size=None, **_options(num_workers, pin_memory, seed))
    handle_corrupt = _CorruptHandler(split)
    return Loader(
        workers,
        lambda batches: handle_corrupt(join_remainders(batches, batch_size, drop_last)),
        batches,
        _num_batches(split, batch_size, drop_last),
    )


class _CorruptHandler:
    """Raises or logs, in this process, the failures that a worker reports.

    Args:
        split: The split, which decides between raising and logging, and records the images already logged.
    """

    def __init__(self, split: FileSplit | StreamSplit) -> None:
        self._split = split

    def __call__(self, batches: Iterable[DecodedBatch]) -> Iterator[Batch]:
        is_empty = True
        for images, labels, corrupt, fatal in batches:
            for name, reason in corrupt:
                self._handle(name, reason)
            if len(labels):
                is_empty = False
                yield images, labels
            if fatal is not None:
                raise DataError(fatal)
        if is_empty:
            raise DataError("no image of the split can be decoded; restore the files.")

    def _handle(self, name: str, reason: str) -> None:
        if self._split.on_corrupt == "stop":
            raise corrupt_error(name, reason)
        if name not in self._split.skipped:
            self._split.skipped.add(name)
            log_skipped(name, reason)


def _check(split: AbstractSplit, batch_size: int, drop_last: bool, num_workers: int) -> None:
    if batch_size < 1:
        raise ValueError(f"`batch_size` (={batch_size}) must be positive; pass 100, for instance.")
    if num_workers < 0:
        raise ValueError(f"`num_workers` (={num_workers}) must not be negative; pass 0 to decode in this process.")
    if drop_last and batch_size > len(split):
        raise ValueError(
            f"`batch_size` (={batch_size}) must not exceed the {len(split)} images of the split with `drop_last`, "
            "which would leave no batch; lower it, or keep the last batch."
        )


def _num_batches(split: AbstractSplit, batch_size: int, drop_last: bool) -> int:
    return len(split) // batch_size if drop_last else -(-len(split) // batch_size)


def _options(num_workers: int, pin_memory: bool, seed: int) -> dict[str, Any]:
    return {
        "collate_fn": _identity,
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "persistent_workers": num_workers > 0,  # starting one takes as long as decoding hundreds of images
        "worker_init_fn": _ignore_interrupt,
        # Without its own generator, every new iterator draws a number from the global one.
        "generator": torch.Generator().manual_seed(seed),
    }


def _ignore_interrupt(_worker: int) -> None:
    # Ctrl-C reaches every process of a terminal. The main one ends the workers, which would each print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _identity(batch: Any) -> Any:
    return batch
