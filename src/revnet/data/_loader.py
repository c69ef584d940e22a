"""Batches of a split, of any kind."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from revnet.data._base import AbstractSplit, ImageSplit
from revnet.data._batch import Decoded, corrupt_error, tell_skipped
from revnet.data._file_split import FileSplit
from revnet.data._sampler import EpochSampler
from revnet.data._stream_batches import StreamBatches, join_remainders
from revnet.data._stream_split import StreamSplit
from revnet.errors import DataError

Batch = tuple[Tensor, Tensor]


class _HasEpoch(Protocol):
    def set_epoch(self, epoch: int) -> None: ...


class Loader(Iterable[Batch]):
    """Batches of (images, labels), uint8 (B, C, H, W) and int64 (B,): what `make_loader` returns.

    Lightning's Trainer takes it as it takes a `DataLoader`, and tells its `sampler` the epoch.
    """

    batch_sampler = None  # where there is a `sampler`, Lightning looks for this too

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
            # Now, and not whenever the garbage collector comes to the traceback that holds this loader.
            self.close()
            raise

    def close(self) -> None:
        """End the worker processes; another iteration would start new ones."""
        if self._workers._iterator is not None:
            self._workers._iterator._shutdown_workers()  # type: ignore[attr-defined]  # PyTorch offers no other way
            self._workers._iterator = None

    # Lightning ends the worker processes of a `DataLoader` through this attribute, when a fit is over.

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

    The order of an epoch, and the random crops in it, are a function of `seed` and the epoch's number alone, which
    `loader.sampler.set_epoch` sets (Lightning calls it). So a run that resumes at an epoch sees the batches that it
    would have seen, and nothing is drawn from PyTorch's global generator. The order of a stream depends on
    `num_workers` too, which share its shards; its crops do not.

    Args:
        split: The images.
        batch_size: Images a batch; the last one is smaller unless `drop_last`, and so is one with images left out.
        shuffle: A new order each epoch; otherwise the order of the split.
        seed: Which orders, and which crops.
        drop_last: Leave out the last batch when it is not full.
        pin_memory: Put batches into page-locked memory, for faster copies to a GPU.
        num_workers: Processes that decode images, which stay alive between epochs; 0 decodes in this one. Images in
            memory have no need of any: a batch is one indexing operation.

    Raises:
        ValueError: `batch_size` is not positive, `num_workers` negative, or `drop_last` would leave no batch. While
            iterating, DataError: an image cannot be decoded, and the data set was loaded with `on_corrupt="stop"`.
    """
    _check(split, batch_size, drop_last, num_workers)
    if isinstance(split, StreamSplit):
        return _stream_loader(split, batch_size, shuffle, seed, drop_last, pin_memory, num_workers)
    sampler: DistributedSampler[Batch] | EpochSampler
    unpack: Callable[[DataLoader[Any]], Iterator[Batch]]
    if isinstance(split, ImageSplit):
        num_workers = 0
        # Made for several processes; with one, it is PyTorch's shuffle whose order depends on (seed, epoch) alone.
        sampler = DistributedSampler(split, num_replicas=1, rank=0, shuffle=shuffle, seed=seed)
        unpack = iter
    elif isinstance(split, FileSplit):
        sampler = EpochSampler(split, shuffle=shuffle, seed=seed)
        unpack = _Checked(split)
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
    check = _Checked(split)
    return Loader(
        workers,
        lambda batches: check(join_remainders(batches, batch_size, drop_last)),
        batches,
        _num_batches(split, batch_size, drop_last),
    )


class _Checked:
    """Raises in this process what a worker reported, or says it once.

    Args:
        split: What says which of the two, and remembers what was said.
    """

    def __init__(self, split: FileSplit | StreamSplit) -> None:
        self._split = split

    def __call__(self, batches: Iterable[Decoded]) -> Iterator[Batch]:
        found_any = False
        for images, labels, corrupt, fatal in batches:
            for where, reason in corrupt:
                self._handle(where, reason)
            if len(labels):
                found_any = True
                yield images, labels
            if fatal is not None:
                raise DataError(fatal)
        if not found_any:
            raise DataError("not one image of the split can be decoded; restore the files.")

    def _handle(self, where: str, reason: str) -> None:
        if self._split.on_corrupt == "stop":
            raise corrupt_error(where, reason)
        if where not in self._split.skipped:
            self._split.skipped.add(where)
            tell_skipped(where, reason)


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
        "collate_fn": _as_is,
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "persistent_workers": num_workers > 0,  # starting one takes as long as decoding hundreds of images
        "worker_init_fn": _ignore_interrupt,
        # Without its own generator, every new iterator draws a number from the global one.
        "generator": torch.Generator().manual_seed(seed),
    }


def _ignore_interrupt(_worker: int) -> None:
    # Ctrl-C goes to every process of a terminal; the main one ends the workers, which would each print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_is(batch: Any) -> Any:
    return batch
