"""A stream cut into batches, in worker processes that share its shards."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch.utils.data import IterableDataset, get_worker_info

from revnet.data._batch import Decoded, Encoded, decode_batch
from revnet.data._crop import Draw
from revnet.data._rows import Order, Row, label_error
from revnet.data._stream_split import StreamSplit
from revnet.errors import DataError


class StreamBatches(IterableDataset[Decoded]):
    """The batches of a stream. Each worker's last one may be smaller, see `join_remainders`.

    The order is a function of seed, epoch and number of workers; the crop of an image is one of seed, epoch and image.

    Args:
        split: The stream.
        batch_size: Images a batch.
        shuffle: A new order each epoch; otherwise each worker reads its shards as they are stored.
        seed: Which orders and crops.
    """

    def __init__(self, split: StreamSplit, *, batch_size: int, shuffle: bool, seed: int) -> None:
        self._split = split
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers live on from epoch to epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is of; 0 until then. Lightning calls it."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Decoded]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch = int(self._epoch)
        rows = self._split.rows.read(Order(self._seed, epoch) if self._shuffle else None, worker, num_workers)
        while True:
            try:
                chunk = [self._encoded(row, epoch) for row in islice(rows, self._batch_size)]
            except DataError as error:  # with its message alone, where an exception would bring a whole traceback
                yield _nothing(fatal=str(error))
                return
            if not chunk:
                return
            yield decode_batch(chunk, self._split.crop, self._split.image_shape[1:])

    def _encoded(self, row: Row, epoch: int) -> Encoded:
        label, num_classes = row.label, self._split.num_classes
        if label is None or not 0 <= label < num_classes:
            raise label_error(row.where, label, num_classes)
        # A row has no number of its own in a stream that is mixed by several workers, but its bytes never change.
        return Encoded(row.encoded, row.where, label, Draw(self._seed, epoch, zlib.crc32(row.encoded)))


def join_remainders(batches: Iterable[Decoded], batch_size: int, drop_last: bool) -> Iterator[Decoded]:
    """Pass full batches on, and make full ones of what the workers had left over.

    So an epoch has as many batches as one process would make, whatever the number of workers.
    """
    left: list[Decoded] = []
    for batch in batches:
        if len(batch.labels) + len(batch.corrupt) == batch_size or batch.fatal is not None:
            yield batch
        else:
            left.append(batch)
            yield _nothing(corrupt=batch.corrupt)  # told now, and not at the end of the epoch
    num_left = sum(len(batch.labels) + len(batch.corrupt) for batch in left)
    num_batches = num_left // batch_size if drop_last else -(-num_left // batch_size)
    if num_batches == 0:
        return
    images, labels = (torch.cat(parts) for parts in zip(*((batch.images, batch.labels) for batch in left), strict=True))
    for start in range(0, min(len(labels), num_batches * batch_size), batch_size):
        yield Decoded(images[start : start + batch_size], labels[start : start + batch_size])


def _nothing(corrupt: tuple[tuple[str, str], ...] = (), fatal: str | None = None) -> Decoded:
    return Decoded(torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), corrupt, fatal)
