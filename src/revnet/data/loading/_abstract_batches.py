"""The interface between a loader and the source of its batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from revnet.data.decoding.batch import DecodedBatch
from revnet.data.loading._position import Position
from revnet.data.loading._share import Share


class AbstractBatches(ABC):
    """Batches of one process, in the order of an epoch, with a position that can be saved."""

    position: Position
    """Place of the next batch."""
    share: Share
    """Part of every global batch that this process reads."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches in an epoch."""

    @abstractmethod
    def follow(self, workers: Iterable[Any]) -> Iterator[DecodedBatch]:
        """Yield what the workers return as batches, and count each batch just before it is yielded."""

    def hand_out(self, batch: DecodedBatch) -> DecodedBatch:
        """Count a batch that is about to be yielded.

        An epoch has the same number of batches in every process. A batch whose images were all skipped can therefore be
        left out only if there is one process.
        """
        self.position.advance()
        if len(batch.labels) or self.share.is_whole or batch.fatal is not None:
            return batch
        return batch._replace(
            fatal="no image of a process's part of a batch can be decoded; restore the files, or pass a larger "
            "`batch_size`."
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, initially 0. Lightning calls it."""
        self.position.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return self.position.save()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the position."""
        self.position.load(state)
