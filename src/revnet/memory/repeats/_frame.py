"""Describe positions of a chain relative to other positions, so that the description fits longer chains too."""

from collections.abc import Callable, Hashable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from revnet.memory.repeats._windows import REACH
from revnet.memory.step._step_log import Integers

UNKNOWN = 2**60
"""Stands for a description that does not apply. All descriptions are larger numbers, and all other numbers smaller."""
ZERO = UNKNOWN + 2**30
"""Description of distance 0."""
_RUNS = (-1, 0, 1)
"""Runs of one policy to whose first and last position a distance is given: the own one, and one before and after it."""
NUM_HOLDS = 2
"""Number of streams for which the nearest earlier position of the chain that holds them is known."""
DESCRIPTION_COLUMNS = 3 + 2 * 2 * len(_RUNS) + 2 * NUM_HOLDS


class NotRepeatedError(Exception):
    """Equal blocks with equal neighbors do not have equal logs, so the whole model must run."""


class AmbiguousError(Exception):
    """The descriptions of a position contradict each other, so more examples are needed.

    Args:
        positions: Positions with the descriptions, and those that they describe.
    """

    def __init__(self, positions: Sequence[int]):
        super().__init__()
        self.positions = positions


class Label(NamedTuple):
    """What is known of a position before it runs."""

    row: Hashable
    """Name of the sequence that contains the position."""
    kind: Hashable
    policy: Hashable
    family: Hashable = None
    """Number that all policies share that run neighboring blocks as one chain."""
    holds: tuple[int, ...] = ()
    """Numbers of the streams that the policy holds, below `NUM_HOLDS`."""
    held_before: tuple[int, ...] = ()
    """Numbers of the streams that an earlier position of the chain holds. A stream is walked back in place to there."""


def with_held_before(labels: Sequence[Label]) -> list[Label]:
    """Return the labels with `held_before`."""
    result: list[Label] = []
    held: set[int] = set()
    for index, label in enumerate(labels):
        if index and _chain_of(labels[index - 1]) != _chain_of(label):
            held = set()
        result.append(label._replace(held_before=tuple(sorted(held))))
        held.update(label.holds)
    return result


def needed_for_chains(labels: Sequence[Label]) -> list[int]:
    """Return positions that a shorter chain must have so that `held_before` is the same in it."""
    if not any(label.holds for label in labels):
        return []
    positions = []
    for index, label in enumerate(labels):
        is_first = not index or _chain_of(labels[index - 1]) != _chain_of(label)
        if is_first or set(label.holds) - set(label.held_before):
            positions.append(index)
    return positions


def _chain_of(label: Label) -> Hashable:
    return label.row, label.family


class Frame:
    """The positions of a chain, with its rows and its runs of one policy.

    A target less than `REACH` away is described by its distance. Another one is described in up to 19 ways, also by its
    distances to the ends of its row, to the ends of the runs around the own position (runs of one policy, and runs of
    policies that form one chain), and to the nearest earlier position that holds a stream, or the one after it; the
    first one of the chain if none does. Which of these descriptions are right shows in several examples: only these
    are always the same.

    Args:
        labels: Label of each position.
    """

    def __init__(self, labels: Sequence[Label]):
        self._count = len(labels)
        self._rows = np.array(_numbers(labels, lambda label: label.row), np.int64)
        self._row_starts, self._row_stops = _bounds(self._rows)
        self._runs = [
            np.array(_numbers(labels, key), np.int64) for key in (lambda label: (label.row, label.policy), _chain_of)
        ]
        self._run_bounds = [_bounds(runs) for runs in self._runs]
        first = self._run_bounds[1][0][self._runs[1]]
        # The stream that a position holds is put back there or at the next position.
        self._holders = [
            np.maximum(_nearest_holders(labels, number) + after, first)
            for number in range(NUM_HOLDS)
            for after in (0, 1)
        ]

    def describe(self, targets: Integers, own: Integers) -> Integers:
        """Return the descriptions of each target from its own position.

        Raises:
            NotRepeatedError: A target has no description.
        """
        rows = self._rows[targets]
        near = _described(targets - own, REACH)
        columns = [
            near,
            _described(targets - self._row_starts[rows], REACH, rows),
            _described(self._row_stops[rows] - 1 - targets, REACH, rows),
        ]
        columns += [np.where(ends >= 0, _described(targets - ends, 1), UNKNOWN) for ends in self._ends(own)]
        result = np.stack(columns, axis=1)
        # At the edge of the window, whether a run or a row ends there does not show.
        result[np.abs(targets - own) < REACH, 1:] = UNKNOWN
        if (result == UNKNOWN).all(1).any():
            raise NotRepeatedError
        return result

    def _ends(self, own: Integers) -> list[Integers]:
        """Return the ends of the runs around each position, and the nearest holders; -1 for what does not exist."""
        ends = []
        for all_runs, (starts, stops) in zip(self._runs, self._run_bounds, strict=True):
            for number in _RUNS:
                runs = all_runs[own] + number
                exists = (runs >= 0) & (runs < len(starts))
                runs = np.clip(runs, 0, len(starts) - 1)
                ends += [np.where(exists, starts[runs], -1), np.where(exists, stops[runs] - 1, -1)]
        return [*ends, *[holders[own] for holders in self._holders]]

    def find(self, descriptions: Integers, own: Integers) -> Integers:
        """Return the position that is described from each own position.

        Raises:
            AmbiguousError: Descriptions contradict each other.
            NotRepeatedError: Nothing is left of a description.
        """
        distances = descriptions[:, 0] - ZERO
        result = own + distances
        is_far = np.abs(distances) >= REACH
        if is_far.any():
            result[is_far] = self._find_far(descriptions[is_far], own[is_far])
        if ((result < 0) | (result >= self._count)).any():
            raise NotRepeatedError
        return result

    def _find_far(self, descriptions: Integers, own: Integers) -> Integers:
        """Return the positions that are not described by their distance alone."""
        values = descriptions - ZERO
        is_known = descriptions != UNKNOWN
        places, distances = np.divmod(values[:, 1:3] + REACH, 2 * REACH + 1)
        distances -= REACH
        rows = np.clip(places, 0, len(self._row_starts) - 1)
        candidates = [
            own + values[:, 0],
            self._row_starts[rows[:, 0]] + distances[:, 0],
            self._row_stops[rows[:, 1]] - 1 - distances[:, 1],
        ]
        candidates += [
            np.where(ends >= 0, ends + values[:, column], -1) for column, ends in enumerate(self._ends(own), start=3)
        ]
        found = np.stack(candidates, axis=1)
        is_known &= (found >= 0) & (found < self._count)
        if not is_known.any(1).all():
            raise NotRepeatedError
        lowest = np.where(is_known, found, self._count).min(1, initial=self._count)
        highest = np.where(is_known, found, -1).max(1, initial=-1)
        is_ambiguous = lowest != highest
        if is_ambiguous.any():
            positions = np.concatenate((own[is_ambiguous], lowest[is_ambiguous], highest[is_ambiguous]))
            raise AmbiguousError(np.unique(positions).tolist())
        return lowest


def _described(distances: Integers, most: int, rows: Integers | int = 0) -> Integers:
    """Return descriptions of distances, within numbered rows; UNKNOWN for those that are larger than `most`."""
    return np.where(np.abs(distances) <= most, ZERO + rows * (2 * REACH + 1) + distances, UNKNOWN)


def _numbers(labels: Sequence[Label], key: Callable[[Label], Hashable]) -> list[int]:
    """Return for each position the number of the group of neighbors with the same key."""
    return [number for number, (_, group) in enumerate(groupby(labels, key)) for _ in group]


def _nearest_holders(labels: Sequence[Label], number: int) -> Integers:
    """Return for each position the nearest earlier one that holds a stream; -1 if none does."""
    holders = np.array([index if number in label.holds else -1 for index, label in enumerate(labels)], np.int64)
    return np.maximum.accumulate(np.append(-1, holders[:-1]))


def _bounds(numbers: Integers) -> tuple[Integers, Integers]:
    """Return the first position of each group, and the first position after it."""
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    return starts, np.append(starts[1:], len(numbers))
