"""A stream cut into batches, in worker processes that share its shards."""

import zlib
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch.utils.data import IterableDataset, get_worker_info

from revnet.data.decoding.batch import DecodedBatch, EncodedImage, decode_batch
from revnet.data.decoding.image_draw import Draw
from revnet.data.splits.rows import Order, Row, label_error
from revnet.data.splits.stream_split import StreamSplit
from revnet.errors import DataError


class StreamBatches(IterableDataset[DecodedBatch]):
    """The batches of a stream. The last batch of each worker may be smaller, see `join_remainders`.

    The order is a function of seed, epoch and number of workers; the crop of an image is one of seed, epoch and image.

    Args:
        split: The stream.
        batch_size: Images per batch.
        shuffle: Whether each epoch has a new order; otherwise each worker reads its shards as they are stored.
        seed: Seed of the orders and crops.
    """

    def __init__(self, split: StreamSplit, *, batch_size: int, shuffle: bool, seed: int) -> None:
        self._split = split
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared with workers that outlive an epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, initially 0. Lightning calls it."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[DecodedBatch]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch = int(self._epoch)
        rows = self._split.rows.read(Order(self._seed, epoch) if self._shuffle else None, worker, num_workers)
        while True:
            try:
                chunk = [self._to_encoded(row, epoch) for row in islice(rows, self._batch_size)]
            except DataError as error:  # returned as a message, since an exception would carry a whole traceback
                yield _empty_batch(fatal=str(error))
                return
            if not chunk:
                return
            yield decode_batch(chunk, self._split.crop, self._split.image_shape[1:])

    def _to_encoded(self, row: Row, epoch: int) -> EncodedImage:
        label, num_classes = row.label, self._split.num_classes
        if label is None or not 0 <= label < num_classes:
            raise label_error(row.name, label, num_classes)
        # A stream that several workers shuffle does not number its rows, but the bytes of a row never change.
        return EncodedImage(row.encoded, row.name, label, Draw(self._seed, epoch, zlib.crc32(row.encoded)))


def join_remainders(batches: Iterable[DecodedBatch], batch_size: int, drop_last: bool) -> Iterator[DecodedBatch]:
    """Pass full batches on, and join the smaller last batches of the workers into full ones.

    The number of batches per epoch is therefore the same for any number of workers.
    """
    partial: list[DecodedBatch] = []
    for batch in batches:
        if len(batch.labels) + len(batch.corrupt) == batch_size or batch.fatal is not None:
            yield batch
        else:
            partial.append(batch)
            yield _empty_batch(corrupt=batch.corrupt)  # reported at once, not at the end of the epoch
    num_left = sum(len(batch.labels) + len(batch.corrupt) for batch in partial)
    num_batches = num_left // batch_size if drop_last else -(-num_left // batch_size)
    if num_batches == 0:
        return
    images = torch.cat([batch.images for batch in partial])
    labels = torch.cat([batch.labels for batch in partial])
    for start in range(0, min(len(labels), num_batches * batch_size), batch_size):
        yield DecodedBatch(images[start : start + batch_size], labels[start : start + batch_size])


def _empty_batch(corrupt: tuple[tuple[str, str], ...] = (), fatal: str | None = None) -> DecodedBatch:
    return DecodedBatch(torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), corrupt, fatal)
