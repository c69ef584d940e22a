"""The place of a loader in its epoch, for checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any


class Position:
    """Epoch of a loader, and the number of updates in it whose batches were handed out.

    An iteration starts at the beginning of the epoch, or at the place that `load` restored, unless `set_epoch` has
    chosen another epoch since.

    Args:
        bounds: Number of samples (or of batches) before each update of an epoch, and of all updates.
        num_parts: Number of batches that are handed out for each update.
        order: Everything that the order of the batches depends on, except the epoch, by the names of the arguments.
    """

    def __init__(self, bounds: Sequence[int], num_parts: int, order: Mapping[str, int]) -> None:
        self.epoch = 0
        self.num_left_out = 0
        """Number of updates that the current iteration leaves out at its start."""
        self._bounds = bounds
        self._num_updates = len(bounds) - 1
        self._num_parts = num_parts
        self._order = dict(order)
        self._num_handed_out = 0
        self._is_restored = False

    @property
    def updates(self) -> int:
        """Number of updates of this epoch all of whose batches were handed out."""
        return self._num_handed_out // self._num_parts

    @property
    def is_at_end(self) -> bool:
        """Whether all batches of this epoch were handed out."""
        return self.updates >= self._num_updates

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration. A different epoch than before starts at its beginning."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._num_handed_out = 0
            self._is_restored = False

    def begin(self) -> int:
        """Start an iteration, and return the number of updates that it leaves out."""
        if not self._is_restored:
            self._num_handed_out = 0
        self._is_restored = False
        self.num_left_out = self.updates
        return self.num_left_out

    def advance(self) -> None:
        """Count one batch, just before it is handed out."""
        self._num_handed_out += 1

    def save(self) -> dict[str, Any]:
        """Return the position as plain numbers."""
        samples = self._bounds[min(self.updates, self._num_updates)]  # a stream may be longer than announced
        return {"epoch": self.epoch, "updates": self.updates, "samples": samples, **self._order}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a position, at which the next iteration starts.

        Raises:
            ValueError: The position was saved with another order, is outside the epoch, or is within a batch.
        """
        for name, value in self._order.items():
            if state.get(name) != value:
                raise ValueError(
                    f"`{name}` (={value}) must equal the {state.get(name)} of the saved position, which counts batches "
                    f"of that order; use {state.get(name)}, or start again without the position."
                )
        samples = state.get("samples")  # older positions lack it
        updates = self._num_updates if samples == self._bounds[-1] else state["updates"]
        if not 0 <= updates <= self._num_updates:
            raise ValueError(
                f"`updates` (={updates}) of the saved position must be from 0 to {self._num_updates}, the number of "
                "updates in an epoch; start again without the position."
            )
        if samples not in (None, self._bounds[updates]):
            raise ValueError(
                f"`samples` (={samples}) of the saved position must be {self._bounds[updates]}, where this loader has "
                f"made {updates} updates; use the number of processes of the position, which the last batches depend "
                "on without `drop_last`, or start again without the position."
            )
        self.epoch = state["epoch"]
        self._num_handed_out = updates * self._num_parts
        self._is_restored = True
