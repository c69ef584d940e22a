"""Predict the step of a deep model from steps of models with fewer blocks."""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence

import numpy as np
from torch import nn

from revnet.memory.repeats._block_chain import BlockChain, Row, find_rows
from revnet.memory.repeats._frame import DESCRIPTION_COLUMNS, AmbiguousError, Frame, Label, NotRepeatedError
from revnet.memory.repeats._library import Library
from revnet.memory.repeats._pieces import MOMENT_COLUMNS, OUTSIDE, Grid, Joined, Piece, Places
from revnet.memory.repeats._windows import REACH, positions_to_show
from revnet.memory.step._optimizer import OptimizerCost
from revnet.memory.step._run_step import Constants, StepResult, bytes_by_group
from revnet.memory.step._step_log import NO_MODULE, Call, Integers, StepLog

_PASSES = (True, False)
"""The forward pass visits the positions in ascending order, the backward pass in descending order."""
_MOST_ROUNDS = 3
"""Largest number of short chains that are run because of contradictions."""
_EVENT_COLUMNS = 5
# Columns of storages: the index of the event of birth, the size, two for the creator, and moments.
_DEATH = slice(4, 4 + MOMENT_COLUMNS)
_GRADIENT = slice(_DEATH.stop, _DEATH.stop + MOMENT_COLUMNS)
# Columns of calls: two for the module, the index of the event of its start, three for sequence numbers, and a moment.
_STOP_POSITION = slice(6, 6 + DESCRIPTION_COLUMNS)
_STOP = slice(_STOP_POSITION.stop, _STOP_POSITION.stop + MOMENT_COLUMNS)


def find_short_steps(model: nn.Module) -> "ShortSteps | None":
    """Return what predicts the steps of a model with many equal blocks; None for other models."""
    rows = find_rows(model)
    return ShortSteps(model, rows) if rows else None


class ShortSteps:
    """Steps of a model with many equal blocks, of which only some run.

    The log of a step is divided into the pieces of its blocks. A piece is assumed to depend only on the blocks nearby,
    on their policies, and on whether the ends of the chain are nearby. This is checked: wherever blocks have equal
    neighborhoods, in one run or in several runs of different lengths, their pieces must be equal.

    Args:
        model: The model.
        rows: Its sequences with many equal blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: dict[str, Row],
    ):
        self._model, self._library = model, Library()
        self._chain = BlockChain(model, rows)
        self._index_of = {id(module): index for index, module in enumerate(model.modules())}
        self.optimizer_cost: OptimizerCost | None = None
        """Memory of the optimizer, once it is known."""
        self._names = tuple(name for name, _ in model.named_modules())
        self._modules = list(model.modules())
        self._owners: _FullOwners | None = None
        num_owners = Counter(id(module) for block in self._chain.droppable for module in set(block.modules()))
        self._shared = {module for module, count in num_owners.items() if count > 1}
        self._parameters = _parameter_places(model, self._chain.droppable)
        self._constants: dict[Hashable, Constants] = {}
        self._outer: Constants | None = None
        self._gradients: tuple[bool, ...] = ()
        self._start_sequence = 0
        self._device_type = "cpu"
        self.has_results = False
        """Whether a result was returned."""
        self.is_refused = False
        """Whether equal blocks turned out to differ, so that all blocks must run."""

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that may be left out."""
        return self._chain.droppable

    def stand_ins(self, is_own: Callable[[nn.Module], bool] = lambda _: False) -> list[nn.Parameter]:
        """Return for each parameter of the model the same one of the first block of its kind.

        Args:
            is_own: Whether a block keeps its own parameters.
        """
        inside = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        outside = [parameter for parameter in self._model.parameters() if id(parameter) not in inside]
        by_block = [
            list((block if is_own(block) else row.by_kind[kind][0]).parameters())
            for row in self._chain.rows.values()
            for block, kind in zip(row.blocks, row.kinds, strict=True)
        ]
        return [outside[number] if block < 0 else by_block[block][number] for block, number in self._parameters]

    def result(self, prepare: Callable[[Sequence[nn.Module]], None], run: Callable[[], StepResult]) -> StepResult:
        """Return the step of the whole model under its current policies.

        Args:
            prepare: Called with the blocks that are about to run.
            run: Runs the step of the model as it is.

        Raises:
            NotRepeatedError: Blocks that should be equal are not.
        """
        chain, library = self._chain, self._library
        if not chain.positions:
            with chain.showing_first() as blocks:
                prepare(blocks)
                chain.discover(run().log)
        labels = chain.labels()
        windows = library.windows(labels)
        is_first = not library.known
        if any(window not in library.known for window in windows):
            self._show(labels, windows, prepare, run, num_examples=2)
        if is_first:  # A second length shows which figures depend on the length.
            self._show(labels, windows, prepare, run, num_examples=3, is_anew=True)
        for _ in range(_MOST_ROUNDS):
            pieces = [library.known[window] for window in windows]
            try:
                log = self._log(Joined(pieces, Frame(labels), _PASSES))
            except AmbiguousError as error:
                self._show(labels, windows, prepare, run, num_examples=2, also=error.positions)
            else:
                self.has_results = True
                return StepResult(log, self._all_constants(), self._has_gradient(pieces), self._device_type)
        raise NotRepeatedError

    def _show(
        self,
        labels: Sequence[Label],
        windows: Sequence[int],
        prepare: Callable[[Sequence[nn.Module]], None],
        run: Callable[[], StepResult],
        *,
        num_examples: int,
        is_anew: bool = False,
        also: Sequence[int] = (),
    ) -> None:
        """Run a short chain that has all windows of the chain that are not known."""
        chain = self._chain
        known: Collection[int] = () if is_anew else self._library.known
        near = {min(max(0, index + step), len(labels) - 1) for index in also for step in range(-REACH, REACH + 1)}
        shown = positions_to_show(windows, known, [*chain.fixed, *self._ends(), *near], num_examples=num_examples)
        blocks = chain.blocks_for(shown)
        prepare(list(blocks.values()))
        with chain.showing(blocks):
            result = run()
            self._add(shown, blocks, [labels[index] for index in shown], result)

    def _ends(self) -> list[int]:
        """Return the last position of each row, so that no row is empty."""
        last = {position.holder: index for index, position in enumerate(self._chain.positions) if position is not None}
        return [last[name] for name in self._chain.rows]

    # From logs to pieces ----------------------------------------------------------------------------------------------

    def _add(
        self, shown: Sequence[int], blocks: dict[int, nn.Module], labels: Sequence[Label], result: StepResult
    ) -> None:
        log, windows = result.log, self._library.windows(labels)
        firsts = self._chain.first_calls(shown, blocks, log)
        sequence = _Sequence(log, [call.start_sequence for call in firsts])
        positions = _positions(log, [call.start_event for call in firsts], sequence)
        passes = (np.arange(log.num_events) > log.forward_end).astype(np.int64)
        grid = Grid.of(passes, positions, len(shown), _PASSES)
        places = Places(grid, passes, positions, Frame(labels))
        owners = _Owners(self._model, self._shown_blocks(shown, blocks), self._shared, self._index_of)
        events = np.zeros((log.num_events, _EVENT_COLUMNS), np.int64)
        events[:, 0], events[:, 1] = log.flops, log.moved_bytes
        events[:, 2] = log.sequence - sequence.starts[positions]
        events[:, 3:] = owners.rows(log.owners, positions)
        storages = _storage_rows(log, places, owners)
        calls = _call_rows(log, places, sequence, owners)
        gradients = self._gradients_of(blocks, result.has_gradient)
        born_at, born_in = positions[log.births], passes[log.births]
        called_at = positions[np.array([call.start_event for call in log.calls], np.int64)]
        for index, window in enumerate(windows):
            starts, lengths = grid.starts[:, index], grid.lengths[:, index]
            piece = Piece(
                lengths=lengths.copy(),
                events=[events[start : start + length] for start, length in zip(starts, lengths, strict=True)],
                storages=[storages[(born_at == index) & (born_in == number)] for number in range(len(_PASSES))],
                calls=calls[called_at == index],
                facts=(int(sequence.counts[index]), gradients.get(shown[index])),
            )
            self._library.add(window, piece)
        self._add_constants(blocks, result)
        self._start_sequence = int(sequence.starts[0])

    def _shown_blocks(self, shown: Sequence[int], blocks: dict[int, nn.Module]) -> dict[int, nn.Module]:
        """Return the blocks by their position in the short chain."""
        return {place: blocks[index] for place, index in enumerate(shown) if index in blocks}

    def _gradients_of(self, blocks: dict[int, nn.Module], has_gradient: Sequence[bool]) -> dict[int, tuple[bool, ...]]:
        """Return for each block which of its parameters have gradients, and note this for all others."""
        by_id = dict(zip(map(id, self._model.parameters()), has_gradient, strict=True))
        own = {
            index: tuple(by_id.pop(id(parameter)) for parameter in block.parameters())
            for index, block in blocks.items()
        }
        self._gradients = tuple(by_id.values())
        self._library.share("gradients", self._gradients)
        return own

    def _add_constants(self, blocks: dict[int, nn.Module], result: StepResult) -> None:
        parameters, buffers, inputs = result.constants
        for index, block in blocks.items():
            own = bytes_by_group([block.parameters(), block.buffers()], result.device_type)
            parameters, buffers = parameters - own[0], buffers - own[1]
            position = self._chain.positions[index]
            assert position is not None
            kind = position.holder, self._chain.rows[position.holder].kinds[position.index]
            self._constants[kind] = Constants(own[0], own[1], 0)
        self._outer = Constants(parameters, buffers, inputs)
        self._library.share("constants", self._outer)
        self._device_type = result.device_type
        self._library.share("device", self._device_type)

    # From pieces to the log -------------------------------------------------------------------------------------------

    def _log(self, joined: Joined) -> StepLog:
        numbers = np.array([piece.facts[0] for piece in joined.pieces], np.int64)
        sequence_starts = self._start_sequence + np.cumsum(numbers) - numbers
        if self._owners is None:
            self._owners = _FullOwners(self._all_blocks(), self._index_of)
        owners = self._owners
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
            owners=owners.indices(events[:, 3:], at),
            flops=events[:, 0],
            moved_bytes=events[:, 1],
            calls=self._calls(joined, sequence_starts, owners),
            modules=self._names,
            forward_end=int(joined.grid.lengths[0].sum()) - 1,
        )

    def _calls(self, joined: Joined, sequence_starts: Integers, owners: "_FullOwners") -> list[Call]:
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
        return [Call(self._names[index], self._modules[index], *numbers) for index, *numbers in columns]

    def _all_blocks(self) -> dict[int, nn.Module]:
        chain = self._chain
        return {
            index: chain.rows[position.holder].blocks[position.index]
            for index, position in enumerate(chain.positions)
            if position is not None and position.holder in chain.rows
        }

    def _all_constants(self) -> Constants:
        assert self._outer is not None
        parameters, buffers, inputs = self._outer
        for name, row in self._chain.rows.items():
            for kind, count in Counter(row.kinds).items():
                own = self._constants[name, kind]
                parameters, buffers = parameters + count * own.parameters, buffers + count * own.buffers
        return Constants(parameters, buffers, inputs)

    def _has_gradient(self, pieces: Sequence[Piece]) -> list[bool]:
        # Blocks are numbered in the order of rows, and pieces in the order in which the blocks run.
        by_block = {id(block): pieces[index].facts[1] for index, block in self._all_blocks().items()}
        droppable = self._chain.droppable
        return [
            self._gradients[number] if block < 0 else by_block[id(droppable[block])][number]
            for block, number in self._parameters
        ]


def _parameter_places(model: nn.Module, blocks: Sequence[nn.Module]) -> list[tuple[int, int]]:
    """Return for each parameter the index of its block and its number in it; -1 for those outside of blocks."""
    inside = {
        id(parameter): (index, number)
        for index, block in enumerate(blocks)
        for number, parameter in enumerate(block.parameters())
    }
    places, num_outside = [], 0
    for parameter in model.parameters():
        place = inside.get(id(parameter))
        if place is None:
            place = (-1, num_outside)
            num_outside += 1
        places.append(place)
    return places


class _Sequence:
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


def _positions(log: StepLog, starts: Sequence[int], sequence: _Sequence) -> Integers:
    events = np.arange(log.num_events)
    forward = np.searchsorted(starts, events, side="right")
    return np.where(events <= log.forward_end, forward, sequence.position_of(log.sequence)).astype(np.int64)


class _Owners:
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


class _FullOwners:
    """The modules of the whole model."""

    def __init__(self, blocks: dict[int, nn.Module], index_of: dict[int, int]):
        numbers = {place: [index_of[id(module)] for module in block.modules()] for place, block in blocks.items()}
        self._table = np.full((max(blocks) + 1, max(map(len, numbers.values()))), NO_MODULE, np.int64)
        for place, indices in numbers.items():
            self._table[place, : len(indices)] = indices

    def indices(self, rows: Integers, own: Integers) -> Integers:
        """Return the indices of the modules that `_Owners.rows` described."""
        indices = rows[:, 1].copy()
        inside = rows[:, 0] != OUTSIDE
        places = own[inside] + rows[inside, 0]
        if ((places < 0) | (places >= len(self._table))).any():
            raise NotRepeatedError
        indices[inside] = self._table[places, rows[inside, 1]]
        return indices


def _storage_rows(log: StepLog, places: Places, owners: _Owners) -> Integers:
    """Return for each storage: index of birth, size, two columns for the creator, five for death and for gradient."""
    own = places.positions[log.births]
    rows = np.zeros((len(log.births), _GRADIENT.stop), np.int64)
    rows[:, 0] = log.births - places.grid.starts[places.passes[log.births], own]
    rows[:, 1] = log.sizes
    rows[:, 2:4] = owners.rows(log.creators, own)
    rows[:, _DEATH] = places.moments(log.deaths, own)
    rows[:, _GRADIENT] = places.moments(log.gradient_since, own)
    return rows


def _call_rows(log: StepLog, places: Places, sequence: _Sequence, owners: _Owners) -> Integers:
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
