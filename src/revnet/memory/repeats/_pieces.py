"""Cut the log of a step into pieces, one for each position of a chain, and join the pieces of a longer chain."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from revnet.memory.repeats._frame import (
    DESCRIPTION_COLUMNS,
    UNKNOWN,
    ZERO,
    AmbiguousError,
    Frame,
    NotRepeatedError,
)
from revnet.memory.step._step_log import Integers

MOMENT_COLUMNS = 3 + DESCRIPTION_COLUMNS
OUTSIDE = 2**20
"""Distance that stands for modules outside the blocks."""


class Grid:
    """The events of a step, divided by pass and position.

    Args:
        lengths: (passes, positions) Number of events.
        ascending: Whether each pass visits the positions in ascending order.
    """

    def __init__(self, lengths: Integers, ascending: Sequence[bool]):
        self.lengths, self.ascending = lengths, tuple(ascending)
        in_order = np.concatenate([row[:: 1 if up else -1] for row, up in zip(lengths, ascending, strict=True)])
        starts = np.cumsum(in_order) - in_order
        rows = starts.reshape(lengths.shape)
        self.starts = np.stack([row[:: 1 if up else -1] for row, up in zip(rows, ascending, strict=True)])
        self.num_events = int(in_order.sum())

    @classmethod
    def of(cls, passes: Integers, positions: Integers, num_positions: int, ascending: Sequence[bool]) -> "Grid":
        """Return the grid of events with these passes and positions.

        Raises:
            NotRepeatedError: The events do not visit the positions in order.
        """
        is_up = np.array(ascending)[passes]
        order = passes * num_positions + np.where(is_up, positions, num_positions - 1 - positions)
        if (np.diff(order) < 0).any():
            raise NotRepeatedError
        lengths = np.zeros((len(ascending), num_positions), np.int64)
        np.add.at(lengths, (passes, positions), 1)
        return cls(lengths, ascending)

    def order(self, index: int) -> range:
        """Return the positions in the order in which a pass visits them."""
        count = self.lengths.shape[1]
        return range(count) if self.ascending[index] else range(count - 1, -1, -1)


@dataclass(frozen=True, eq=False)
class Piece:
    """The part of a log that belongs to one position. Other positions are given relative to it."""

    lengths: Integers
    """(passes,) Number of events."""
    events: list[Integers]
    """For each pass, (events, columns)."""
    storages: list[Integers]
    """For each pass, (storages, columns) of the storages created in it."""
    calls: Integers
    """(calls, columns)."""
    facts: tuple[Any, ...]
    """Other figures of the position."""

    def merged(self, other: "Piece") -> "Piece":
        """Return what is true of both pieces, which belong to the same window.

        Raises:
            NotRepeatedError: They differ.
        """
        if self.facts != other.facts or not np.array_equal(self.lengths, other.lengths):
            raise NotRepeatedError
        return Piece(
            lengths=self.lengths,
            events=[_merged(*pair) for pair in zip(self.events, other.events, strict=True)],
            storages=[_merged(*pair) for pair in zip(self.storages, other.storages, strict=True)],
            calls=_merged(self.calls, other.calls),
            facts=self.facts,
        )


def _merged(rows: Integers, other: Integers) -> Integers:
    """Return rows in which each number that is UNKNOWN in one of both is UNKNOWN.

    Descriptions of a target are UNKNOWN if they differ. All other numbers must be equal.
    """
    if rows.shape != other.shape:
        raise NotRepeatedError
    is_equal = rows == other
    if is_equal.all():
        return rows
    # Descriptions are far larger than any other number.
    if not (is_equal | ((rows >= UNKNOWN) & (other >= UNKNOWN))).all():
        raise NotRepeatedError
    return np.where(is_equal, rows, UNKNOWN)


class Places:
    """The positions of a log, which it describes relative to each other.

    Args:
        grid: The events of the log.
        passes: (events,) Pass of each event.
        positions: (events,) Position of each event.
        frame: The chain that ran.
    """

    def __init__(self, grid: Grid, passes: Integers, positions: Integers, frame: Frame):
        self.grid, self.passes, self.positions, self.frame = grid, passes, positions, frame

    def moments(self, events: Integers, own: Integers) -> Integers:
        """Return a row for each event: pass, place in its piece from its beginning and end, and its position.

        The pass is -1 for a moment after the last event.

        Raises:
            NotRepeatedError: A position cannot be described.
        """
        rows = np.zeros((len(events), MOMENT_COLUMNS), np.int64)
        rows[:, 0] = -1
        inside = np.flatnonzero(events < self.grid.num_events)
        targets, passes = self.positions[events[inside]], self.passes[events[inside]]
        # The first moment of a piece is the moment after the last event of the piece before it.
        is_first = (events[inside] > 0) & (events[inside] == self.grid.starts[passes, targets])
        last = events[inside] - 1
        is_first &= passes == self.passes[last]
        targets = np.where(is_first, self.positions[last], targets)
        index = events[inside] - self.grid.starts[passes, targets]
        rows[inside, 0] = passes
        rows[inside, 1] = ZERO + index
        rows[inside, 2] = ZERO + self.grid.lengths[passes, targets] - index
        rows[inside, 3:] = self.frame.describe(targets, own[inside])
        return rows


class Joined:
    """Pieces in the order of a chain.

    Args:
        pieces: One piece for each position.
        frame: The chain.
        ascending: Whether each pass visits the positions in ascending order.
    """

    def __init__(self, pieces: Sequence[Piece], frame: Frame, ascending: Sequence[bool]):
        self.pieces, self.frame = pieces, frame
        self.grid = Grid(np.stack([piece.lengths for piece in pieces], axis=1), ascending)

    def rows(self, table: str) -> list[tuple[Integers, Integers]]:
        """Return for each pass the rows of a table of all pieces in order, and the position of each row."""
        result = []
        for index in range(len(self.grid.ascending)):
            order = self.grid.order(index)
            parts = [getattr(self.pieces[position], table)[index] for position in order]
            result.append((np.concatenate(parts), np.repeat(np.array(order), [len(part) for part in parts])))
        return result

    def calls(self) -> tuple[Integers, Integers]:
        """Return the rows of all calls in order, and the position of each."""
        parts = [piece.calls for piece in self.pieces]
        return np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    def events(self, moments: Integers, own: Integers) -> Integers:
        """Return the events that `Places.moments` described.

        Raises:
            AmbiguousError: The descriptions of an event contradict each other.
            NotRepeatedError: Nothing is left of a description.
        """
        events = np.full(len(moments), self.grid.num_events)
        inside = np.flatnonzero(moments[:, 0] >= 0)
        rows = moments[inside]
        targets = self.frame.find(rows[:, 3:], own[inside])
        lengths = self.grid.lengths[rows[:, 0], targets]
        is_known = rows[:, 1:3] != UNKNOWN
        if not is_known.any(1).all():
            raise NotRepeatedError
        indices = np.stack((rows[:, 1] - ZERO, lengths - rows[:, 2] + ZERO), axis=1)
        index = np.where(is_known[:, 0], indices[:, 0], indices[:, 1])
        is_ambiguous = (is_known.all(1) & (indices[:, 0] != indices[:, 1])) | (index < 0) | (index > lengths)
        if is_ambiguous.any():
            raise AmbiguousError(np.unique(np.append(own[inside][is_ambiguous], targets[is_ambiguous])).tolist())
        events[inside] = self.grid.starts[rows[:, 0], targets] + index
        return events
