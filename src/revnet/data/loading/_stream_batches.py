"""A stream cut into batches, in worker processes that share its shards."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from revnet.data.decoding.batch import DecodedBatch, EncodedImage, decode_batch
from revnet.data.decoding.image_draw import Draw
from revnet.data.loading._abstract_batches import AbstractBatches
from revnet.data.loading._position import Position
from revnet.data.loading._share import Share
from revnet.data.splits.rows import Order, Row, label_error
from revnet.data.splits.stream_split import StreamSplit
from revnet.errors import DataError


class Chunk(NamedTuple):
    """Rows that a worker has read one after the other."""

    reader: int
    """Number of the share of the shards that the rows come from."""
    parts: tuple[DecodedBatch, ...]
    """This process's parts of a global batch or, if the rows do not fill a global batch, all of them in one part."""
    is_full: bool = True
    """Whether the rows fill a global batch."""


class StreamBatches(AbstractBatches, IterableDataset[Chunk]):
    """The batches of a stream for one process.

    Every process reads the whole stream, and decodes only its own part of each global batch. The order is a function of
    seed, epoch and number of workers; the crop of an image is one of seed, epoch and image.

    A restored position leaves out rows without decoding them. Each worker reads its shards from the start of the epoch
    for this.

    Args:
        split: The stream.
        batch_size: Images per global batch.
        drop_last: Whether to leave out the last global batch if it is not full.
        shuffle: Whether each epoch has a new order; otherwise each worker reads its shards as they are stored.
        seed: Seed of the orders and crops.
        share: Part of every global batch that this process decodes.
        num_workers: Number of worker processes; 0 reads in this process.
    """

    def __init__(
        self,
        split: StreamSplit,
        *,
        batch_size: int,
        drop_last: bool,
        shuffle: bool,
        seed: int,
        share: Share,
        num_workers: int,
    ) -> None:
        self._split = split
        self._batch_size = max(batch_size, share.num_processes)
        self._drop_last = drop_last
        self._shuffle = shuffle
        self._seed = seed
        self.share = share
        batches = share.global_batches(len(split), batch_size, drop_last=drop_last)
        self._num_batches = len(batches)
        self._num_readers = max(1, num_workers)
        order = {"seed": seed, "batch_size": batch_size, "num_images": len(split), "num_workers": self._num_readers}
        self.position = Position([0, *(batch.stop for batch in batches)], share.num_parts, order)
        # What was handed out of this epoch: the global batches of each reader, and the reader whose turn is next.
        self._num_read = [0] * self._num_readers
        self._next_reader = 0
        # Epoch, next reader and global batches of each reader, shared with workers that outlive an epoch.
        self._start = torch.zeros(2 + self._num_readers, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self._num_batches * self.share.num_parts

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {**self.position.save(), "next_reader": self._next_reader, "num_read": list(self._num_read)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the position."""
        self.position.load(state)
        self._next_reader = state["next_reader"]
        self._num_read = list(state["num_read"])

    # ---- in a worker

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        reader = 0 if info is None else info.id
        epoch, next_reader, *num_read = self._start.tolist()
        order = Order(self._seed, epoch) if self._shuffle else None
        rows = self._split.rows.read(order, reader, self._num_readers)
        if reader < next_reader:
            # A `DataLoader` always starts with the first worker. This one has had its turn in the current round.
            yield Chunk(reader, (), is_full=False)
        try:
            for _ in islice(rows, num_read[reader] * self._batch_size):
                pass
            while chunk := list(islice(rows, self._batch_size)):
                yield self._decode(reader, chunk, epoch)
        except DataError as error:  # returned as a message, since an exception would carry a whole traceback
            yield Chunk(reader, (DecodedBatch.empty(fatal=str(error)),), is_full=False)

    def _decode(self, reader: int, rows: Sequence[Row], epoch: int) -> Chunk:
        is_full = len(rows) == self._batch_size
        # Which rows join the ones of other workers, and so belong to this process, is not known here.
        parts = self.share.parts(range(len(rows))) if is_full else [range(len(rows))]
        encoded = [self._to_encoded(row, epoch) for row in rows]
        crop, size = self._split.crop, self._split.image_shape[1:]
        decoded = tuple(decode_batch(encoded[part.start : part.stop], crop, size) for part in parts)
        return Chunk(reader, decoded, is_full)

    def _to_encoded(self, row: Row, epoch: int) -> EncodedImage:
        label, num_classes = row.label, self._split.num_classes
        if label is None or not 0 <= label < num_classes:
            raise label_error(row.name, label, num_classes)
        # A stream that several workers shuffle does not number its rows, but the bytes of a row never change.
        return EncodedImage(row.encoded, row.name, label, Draw(self._seed, epoch, zlib.crc32(row.encoded)))

    # ---- in the main process

    def follow(self, workers: Iterable[Chunk]) -> Iterator[DecodedBatch]:
        """Yield the batches that follow the position, the joined remainders of the workers last."""
        if self.position.begin() == 0:
            self._num_read, self._next_reader = [0] * self._num_readers, 0
        if self.position.is_at_end:
            return
        num_joined = self.position.updates - sum(self._num_read)
        self._start.copy_(torch.tensor([self.position.epoch, self._next_reader, *self._num_read]))
        remainders: dict[int, DecodedBatch] = {}
        held: Chunk | None = None
        for chunk in workers:
            if not chunk.is_full:
                for part in chunk.parts:
                    remainders[chunk.reader] = part
                    yield DecodedBatch.empty(part.corrupt, part.fatal)  # reported at once, not at the end of the epoch
            elif not self._may_grow:
                yield from self._hand_out_chunk(chunk)
            else:
                if held is not None:
                    yield from self._hand_out_chunk(held)
                held = chunk
        rest = _joined([remainders[reader] for reader in sorted(remainders)])
        is_taken = self._may_grow and 0 < len(rest.labels) < self.share.num_processes
        if held is not None:
            if is_taken:
                held = held._replace(parts=(_joined([held.parts[0], *self._share_of(rest)]),))
            yield from self._hand_out_chunk(held)
        # A full batch took them, now or before the position was saved. If the epoch has none, a process gets no image.
        if is_taken and sum(self._num_read) > 0:
            return
        for batch in self._cut(rest)[num_joined:]:
            for part in self._share_of(batch):
                yield self.hand_out(part)

    @property
    def _may_grow(self) -> bool:
        """Whether the last full batch may have to take images that are too few for every process."""
        return not self._drop_last and self.share.num_processes > 1

    def _hand_out_chunk(self, chunk: Chunk) -> Iterator[DecodedBatch]:
        *parts, last = chunk.parts
        for part in parts:
            yield self.hand_out(part)
        self._num_read[chunk.reader] += 1
        self._next_reader = (chunk.reader + 1) % self._num_readers
        yield self.hand_out(last)

    def _cut(self, rest: DecodedBatch) -> list[DecodedBatch]:
        """Cut the joined remainders of all workers into global batches.

        The number of batches per epoch is therefore the same for any number of workers.
        """
        num_rows = len(rest.labels) + len(rest.corrupt)
        num_batches = num_rows // self._batch_size if self._drop_last else -(-num_rows // self._batch_size)
        num_images = min(len(rest.labels), num_batches * self._batch_size)
        return [rest.part(batch) for batch in self.share.global_batches(num_images, self._batch_size, drop_last=False)]

    def _share_of(self, batch: DecodedBatch) -> list[DecodedBatch]:
        return [batch.part(part) for part in self.share.parts(range(len(batch.labels)))]


def _joined(batches: Sequence[DecodedBatch]) -> DecodedBatch:
    if not batches:
        return DecodedBatch.empty()
    images, labels, numbers, corrupt, _ = zip(*batches, strict=True)
    return DecodedBatch(torch.cat(images), torch.cat(labels), torch.cat(numbers), tuple(chain.from_iterable(corrupt)))
