"""The place of a loader in its epoch, for checkpoints."""

from collections.abc import Mapping
from typing import Any


class Position:
    """Epoch of a loader, and the number of updates in it whose batches were handed out.

    An iteration starts at the beginning of the epoch, or at the place that `load` restored, unless `set_epoch` has
    chosen another epoch since.

    Args:
        num_updates: Number of updates in an epoch.
        num_parts: Number of batches that are handed out for each update.
        order: Everything that the order of the batches depends on, except the epoch, by the names of the arguments.
    """

    def __init__(self, num_updates: int, num_parts: int, order: Mapping[str, int]) -> None:
        self.epoch = 0
        self.num_left_out = 0
        """Number of updates that the current iteration leaves out at its start."""
        self._num_updates = num_updates
        self._num_parts = num_parts
        self._order = dict(order)
        self._num_handed_out = 0
        self._is_restored = False

    @property
    def updates(self) -> int:
        """Number of updates of this epoch all of whose batches were handed out."""
        return self._num_handed_out // self._num_parts

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
        return {"epoch": self.epoch, "updates": self.updates, **self._order}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a position, at which the next iteration starts.

        Raises:
            ValueError: The position was saved with another order, or is outside the epoch.
        """
        for name, value in self._order.items():
            if state.get(name) != value:
                raise ValueError(
                    f"`{name}` (={value}) must equal the {state.get(name)} of the saved position, which counts batches "
                    f"of that order; use {state.get(name)}, or start again without the position."
                )
        if not 0 <= state["updates"] <= self._num_updates:
            raise ValueError(
                f"`updates` (={state['updates']}) of the saved position must be from 0 to {self._num_updates}, the "
                "number of updates in an epoch; start again without the position."
            )
        self.epoch = state["epoch"]
        self._num_handed_out = state["updates"] * self._num_parts
        self._is_restored = True
