"""Turn the log of a short chain into rows of numbers, and pieces of logs into the log of a whole model."""

from collections.abc import Sequence

import numpy as np
from torch import nn

from revnet.memory.repeats._frame import DESCRIPTION_COLUMNS, NotRepeatedError
from revnet.memory.repeats._pieces import MOMENT_COLUMNS, OUTSIDE, Joined, Places
from revnet.memory.step._step_log import NO_MODULE, Call, Integers, StepLog

PASSES = (True, False)
"""The forward pass visits the positions in ascending order, the backward pass in descending order."""
EVENT_COLUMNS = 6
# Columns of storages: the index of the event of birth, the size, two for the creator, and moments.
_DEATH = slice(4, 4 + MOMENT_COLUMNS)
_GRADIENT = slice(_DEATH.stop, _DEATH.stop + MOMENT_COLUMNS)
# Columns of calls: two for the module, the index of the event of its start, three for sequence numbers, and a moment.
_STOP_POSITION = slice(6, 6 + DESCRIPTION_COLUMNS)
_STOP = slice(_STOP_POSITION.stop, _STOP_POSITION.stop + MOMENT_COLUMNS)


class SequenceStarts:
    """The sequence numbers at which the positions of a short chain begin."""

    def __init__(self, log: StepLog, starts: Sequence[int]):
        self.starts = np.array([log.calls[0].start_sequence, *starts], np.int64)
        self.end = int(log.sequence[log.forward_end])
        self.counts = np.diff([*self.starts, self.end])

    def position_of(self, numbers: Integers) -> Integers:
        return np.maximum(np.searchsorted(self.starts[1:], numbers, side="right"), 0)

    def nearest(self, numbers: Integers, own: Integers) -> Integers:
        """Return the position that begins at each number or contains it; of several, the one nearest to `own`."""
        low = np.searchsorted(self.starts[1:], numbers, side="left")
        high = np.searchsorted(self.starts[1:], numbers, side="right")
        return np.clip(own, low, high)


def positions_of(log: StepLog, starts: Sequence[int], sequence: SequenceStarts) -> Integers:
    events = np.arange(log.num_events)
    forward = np.searchsorted(starts, events, side="right")
    return np.where(events <= log.forward_end, forward, sequence.position_of(log.sequence)).astype(np.int64)


class Owners:
    """The modules of a short chain, as distances to the blocks that contain them."""

    def __init__(self, model: nn.Module, blocks: dict[int, nn.Module], shared: set[int], index_of: dict[int, int]):
        inside = {
            id(module): (place, number)
            for place, block in blocks.items()
            for number, module in enumerate(block.modules())
            if id(module) not in shared
        }
        self._table = np.full((self._count(model) + 1, 2), OUTSIDE, np.int64)
        for index, module in enumerate(model.modules()):
            place, number = inside.get(id(module), (OUTSIDE, index_of.get(id(module), NO_MODULE)))
            self._table[index] = place, number
        self._table[NO_MODULE] = OUTSIDE, NO_MODULE

    @staticmethod
    def _count(model: nn.Module) -> int:
        return sum(1 for _ in model.modules())

    def rows(self, indices: Integers, own: Integers) -> Integers:
        """Return for each index of a module the distance to its block, and its number there."""
        rows = self._table[indices].copy()
        inside = rows[:, 0] != OUTSIDE
        rows[inside, 0] -= own[inside]
        return rows


class FullOwners:
    """The modules of the whole model."""

    def __init__(self, blocks: dict[int, nn.Module], index_of: dict[int, int]):
        numbers = {place: [index_of[id(module)] for module in block.modules()] for place, block in blocks.items()}
        self._table = np.full((max(blocks) + 1, max(map(len, numbers.values()))), NO_MODULE, np.int64)
        for place, indices in numbers.items():
            self._table[place, : len(indices)] = indices

    def indices(self, rows: Integers, own: Integers) -> Integers:
        """Return the indices of the modules that `Owners.rows` described."""
        indices = rows[:, 1].copy()
        inside = rows[:, 0] != OUTSIDE
        places = own[inside] + rows[inside, 0]
        if ((places < 0) | (places >= len(self._table))).any():
            raise NotRepeatedError
        indices[inside] = self._table[places, rows[inside, 1]]
        return indices


def storage_rows(log: StepLog, places: Places, owners: Owners) -> Integers:
    """Return for each storage: index of birth, size, two columns for the creator, five for death and for gradient."""
    own = places.positions[log.births]
    rows = np.zeros((len(log.births), _GRADIENT.stop), np.int64)
    rows[:, 0] = log.births - places.grid.starts[places.passes[log.births], own]
    rows[:, 1] = log.sizes
    rows[:, 2:4] = owners.rows(log.creators, own)
    rows[:, _DEATH] = places.moments(log.deaths, own)
    rows[:, _GRADIENT] = places.moments(log.gradient_since, own)
    return rows


def call_rows(log: StepLog, places: Places, sequence: SequenceStarts, owners: Owners) -> Integers:
    """Return for each call: two columns for the module, start, five for the stop, and four for sequence numbers."""
    index_of = {name: index for index, name in enumerate(log.modules)}
    modules, starts, stops, first_numbers, stop_numbers = np.array(
        [
            (index_of[call.name], call.start_event, call.stop_event, call.start_sequence, call.stop_sequence)
            for call in log.calls
        ],
        np.int64,
    ).T
    own = places.positions[starts]
    rows = np.zeros((len(log.calls), _STOP.stop), np.int64)
    rows[:, 0:2] = owners.rows(modules, own)
    rows[:, 2] = starts - places.grid.starts[0, own]
    rows[:, 3] = first_numbers - sequence.starts[own]
    targets = sequence.nearest(stop_numbers, own)
    rows[:, 4] = stop_numbers - sequence.starts[targets]
    rows[:, _STOP_POSITION] = places.frame.describe(targets, own)
    rows[:, _STOP] = places.moments(stops, own)
    return rows


def join_log(
    joined: Joined, start_sequence: int, owners: FullOwners, names: Sequence[str], modules: Sequence[nn.Module]
) -> StepLog:
    """Return the log that consists of pieces.

    Args:
        joined: The pieces in order.
        start_sequence: Sequence number at the beginning.
        owners: The modules of blocks.
        names: Names of the modules of the model.
        modules: The modules of the model.
    """
    numbers = np.array([piece.facts[0] for piece in joined.pieces], np.int64)
    sequence_starts = start_sequence + np.cumsum(numbers) - numbers
    (events_f, at_f), (events_b, at_b) = joined.rows("events")
    events, at = np.concatenate((events_f, events_b)), np.concatenate((at_f, at_b))
    born, born_at, born_in = [], [], []
    for number, (rows, own) in enumerate(joined.rows("storages")):
        born.append(rows)
        born_at.append(own)
        born_in.append(np.full(len(rows), number))
    storages, own, passes = (np.concatenate(parts) for parts in (born, born_at, born_in))
    return StepLog(
        births=joined.grid.starts[passes, own] + storages[:, 0],
        deaths=joined.events(storages[:, _DEATH], own),
        sizes=storages[:, 1],
        gradient_since=joined.events(storages[:, _GRADIENT], own),
        creators=owners.indices(storages[:, 2:4], own),
        sequence=events[:, 2] + sequence_starts[at],
        owners=owners.indices(events[:, 3:5], at),
        flops=events[:, 0],
        moved_bytes=events[:, 1],
        keep_kinds=events[:, 5],
        calls=_calls(joined, sequence_starts, owners, names, modules),
        modules=names,
        forward_end=int(joined.grid.lengths[0].sum()) - 1,
    )


def _calls(
    joined: Joined,
    sequence_starts: Integers,
    owners: FullOwners,
    names: Sequence[str],
    modules: Sequence[nn.Module],
) -> list[Call]:
    rows, own = joined.calls()
    indices = owners.indices(rows[:, 0:2], own)
    starts = joined.grid.starts[0, own] + rows[:, 2]
    stops = joined.events(rows[:, _STOP], own)
    start_numbers = sequence_starts[own] + rows[:, 3]
    stop_numbers = sequence_starts[joined.frame.find(rows[:, _STOP_POSITION], own)] + rows[:, 4]
    columns = zip(
        indices.tolist(),
        starts.tolist(),
        stops.tolist(),
        start_numbers.tolist(),
        stop_numbers.tolist(),
        strict=True,
    )
    return [Call(names[index], modules[index], *numbers) for index, *numbers in columns]
