"""Compute the figures of a deep model from the figures of shallow ones."""

from collections.abc import Callable, Sequence

import numpy as np

from revnet.memory.distributed._process_step import PHASES, ProcessStep
from revnet.memory.step._memory_parts import Phase
from revnet.memory.step._step_log import Integers


class NotPeriodicError(Exception):
    """One more block does not insert the same operations in one place."""


def extrapolated(
    predict: Callable[[Sequence[int]], ProcessStep], sizes: Sequence[int], short: Sequence[int]
) -> ProcessStep:
    """Return the step of a model of the given sizes, from the steps of smaller models.

    Args:
        predict: Returns the step of a model with other sizes, such as numbers of blocks.
        sizes: The sizes, any number.
        short: A smaller size for each of them. Models with one more and with two more must be smaller, too.

    Raises:
        NotPeriodicError: The step does not grow evenly with the sizes.
    """
    base = predict(short)
    longer = [predict([size + (index == other) for other, size in enumerate(short)]) for index in range(len(short))]
    if not _is_same(_spliced(base, longer, [2] * len(short)), predict([size + 2 for size in short])):
        raise NotPeriodicError
    return _spliced(base, longer, [size - less for size, less in zip(sizes, short, strict=True)])


def _spliced(base: ProcessStep, longer: Sequence[ProcessStep], num_more: Sequence[int]) -> ProcessStep:
    """Return the step of a model with more blocks.

    Each additional block of a run inserts the same segment into the changes of each phase. Bytes that do not change
    during a step, and collectives, grow by the same number with each block.

    Args:
        base: Step of a model with short runs of equal blocks.
        longer: For each run, the step of the model in which this run has one more block.
        num_more: For each run, how many more blocks it has than in `base`.

    Raises:
        NotPeriodicError: The changes of a longer model do not contain the changes of the base.
    """

    def extrapolate(value: Integers, longer_values: Sequence[Integers]) -> Integers:
        return value + sum(count * (other - value) for count, other in zip(num_more, longer_values, strict=True))

    keys = {key for step in (base, *longer) for key in step.collectives}
    collectives = {
        key: extrapolate(_collective(base, key), [_collective(step, key) for step in longer]) for key in sorted(keys)
    }
    changes: dict[Phase, Integers] = {}
    for phase in PHASES:
        segments = [_inserted(base.changes[phase], step.changes[phase]) for step in longer]
        changes[phase] = _insert(base.changes[phase], segments, num_more)
    return ProcessStep(
        start=extrapolate(base.start, [step.start for step in longer]),
        changes=changes,
        held=extrapolate(base.held, [step.held for step in longer]),
        collectives={key: (int(number), int(num_bytes)) for key, (number, num_bytes) in collectives.items()},
        whole_parameter_bytes=int(
            extrapolate(np.array(base.whole_parameter_bytes), [np.array(step.whole_parameter_bytes) for step in longer])
        ),
    )


def _is_same(step: ProcessStep, other: ProcessStep) -> bool:
    """Return whether two steps have the same bytes at each moment, and the same collectives."""
    return (
        np.array_equal(step.start, other.start)
        and np.array_equal(step.held, other.held)
        and all(np.array_equal(step.changes[phase], other.changes[phase]) for phase in PHASES)
        and step.collectives == other.collectives
        and step.whole_parameter_bytes == other.whole_parameter_bytes
    )


def _collective(step: ProcessStep, key: tuple[Phase, str]) -> Integers:
    return np.array(step.collectives.get(key, (0, 0)), np.int64)


def _inserted(rows: Integers, longer: Integers) -> tuple[int, Integers]:
    """Return the segment by which `longer` differs from `rows`, and the row before which it is inserted."""
    count = min(len(rows), len(longer))
    differs = np.flatnonzero((rows[:count] != longer[:count]).any(1))
    position = int(differs[0]) if len(differs) else count
    length = len(longer) - len(rows)
    if length < 0 or not np.array_equal(longer[position + length :], rows[position:]):
        raise NotPeriodicError
    return position, longer[position : position + length]


def _insert(rows: Integers, segments: Sequence[tuple[int, Integers]], num_times: Sequence[int]) -> Integers:
    """Insert each segment a number of times. Repetitions between the first and the last become one row.

    Bytes grow evenly from one repetition to the next, so they are highest in the first or in the last.
    """
    pieces, start = [], 0
    for (position, segment), count in sorted(zip(segments, num_times, strict=True), key=lambda item: item[0][0]):
        pieces.append(rows[start:position])
        start = position
        if count <= 3:
            pieces += [segment] * count
        else:
            pieces += [segment, (count - 2) * segment.sum(0, keepdims=True), segment]
    return np.concatenate([*pieces, rows[start:]])
