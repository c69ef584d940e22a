"""Predict the step of a deep model from steps of models with fewer blocks."""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from revnet.memory.repeats._block_chain import BlockChain, Row, find_rows
from revnet.memory.repeats._frame import (
    AmbiguousError,
    Frame,
    Label,
    NotRepeatedError,
    needed_for_chains,
    with_held_before,
)
from revnet.memory.repeats._library import Library
from revnet.memory.repeats._pieces import Grid, Joined, Piece, Places
from revnet.memory.repeats._short_log import (
    EVENT_COLUMNS,
    PASSES,
    FullOwners,
    Owners,
    SequenceStarts,
    call_rows,
    join_log,
    positions_of,
    storage_rows,
)
from revnet.memory.repeats._windows import REACH, positions_to_show
from revnet.memory.step._optimizer import OptimizerCost
from revnet.memory.step._run_step import Constants, StepResult, bytes_by_group
from revnet.memory.step._step_log import StepLog

_Layouts = Sequence[torch.layout | None]
"""Layouts of the gradients of some parameters; None for one without a gradient."""
_MOST_ROUNDS = 3
"""Largest number of short chains that are run because of contradictions."""


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
        self._owners: FullOwners | None = None
        num_owners = Counter(id(module) for block in self._chain.droppable for module in set(block.modules()))
        self._shared = {module for module, count in num_owners.items() if count > 1}
        self._parameters = _parameter_places(model, self._chain.droppable)
        self._constants: dict[Hashable, Constants] = {}
        self._outer: Constants | None = None
        self._gradients: _Layouts = ()
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
        if any(window not in library.known for window in windows):
            raise NotRepeatedError
        for _ in range(_MOST_ROUNDS):
            pieces = [library.known[window] for window in windows]
            try:
                log = self._log(pieces, Frame(labels))
            except AmbiguousError as error:
                self._show(labels, windows, prepare, run, num_examples=2, also=error.positions)
            else:
                self.has_results = True
                return StepResult(log, self._all_constants(), self._all_gradients(pieces), self._device_type)
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
        fixed = [*chain.fixed, *chain.ends, *near, *needed_for_chains(labels)]
        shown = positions_to_show(windows, known, fixed, num_examples=num_examples)
        blocks = chain.blocks_for(shown)
        prepare(list(blocks.values()))
        with chain.showing(blocks):
            result = run()
            self._add(shown, blocks, with_held_before([labels[index] for index in shown]), result)

    def _add(
        self, shown: Sequence[int], blocks: dict[int, nn.Module], labels: Sequence[Label], result: StepResult
    ) -> None:
        log, windows = result.log, self._library.windows(labels)
        firsts = self._chain.first_calls(shown, blocks, log)
        sequence = SequenceStarts(log, [call.start_sequence for call in firsts])
        positions = positions_of(log, [call.start_event for call in firsts], sequence)
        passes = (np.arange(log.num_events) > log.forward_end).astype(np.int64)
        grid = Grid.of(passes, positions, len(shown), PASSES)
        places = Places(grid, passes, positions, Frame(labels))
        shown_blocks = {place: blocks[index] for place, index in enumerate(shown) if index in blocks}
        owners = Owners(self._model, shown_blocks, self._shared, self._index_of)
        events = np.zeros((log.num_events, EVENT_COLUMNS), np.int64)
        events[:, 0], events[:, 1] = log.flops, log.moved_bytes
        events[:, 2] = log.sequence - sequence.starts[positions]
        events[:, 3:5] = owners.rows(log.owners, positions)
        events[:, 5] = log.keep_kinds
        storages = storage_rows(log, places, owners)
        calls = call_rows(log, places, sequence, owners)
        gradients = self._gradients_of(blocks, result.gradients)
        born_at, born_in = positions[log.births], passes[log.births]
        called_at = positions[np.array([call.start_event for call in log.calls], np.int64)]
        for index, window in enumerate(windows):
            starts, lengths = grid.starts[:, index], grid.lengths[:, index]
            piece = Piece(
                lengths=lengths.copy(),
                events=[events[start : start + length] for start, length in zip(starts, lengths, strict=True)],
                storages=[storages[(born_at == index) & (born_in == number)] for number in range(len(PASSES))],
                calls=calls[called_at == index],
                facts=(int(sequence.counts[index]), gradients.get(shown[index])),
            )
            self._library.add(window, piece)
        self._add_constants(blocks, result)
        self._start_sequence = int(sequence.starts[0])

    def _gradients_of(self, blocks: dict[int, nn.Module], layouts: _Layouts) -> Mapping[int, _Layouts]:
        """Return for each block the layouts of the gradients of its parameters, and note the ones of all others."""
        by_id = dict(zip(map(id, self._model.parameters()), layouts, strict=True))
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

    def _log(self, pieces: Sequence[Piece], frame: Frame) -> StepLog:
        if self._owners is None:
            self._owners = FullOwners(self._chain.all_blocks(), self._index_of)
        joined = Joined(pieces, frame, PASSES)
        return join_log(joined, self._start_sequence, self._owners, self._names, self._modules)

    def _all_constants(self) -> Constants:
        assert self._outer is not None
        parameters, buffers, inputs = self._outer
        for name, row in self._chain.rows.items():
            for kind, count in Counter(row.kinds).items():
                own = self._constants[name, kind]
                parameters, buffers = parameters + count * own.parameters, buffers + count * own.buffers
        return Constants(parameters, buffers, inputs)

    def _all_gradients(self, pieces: Sequence[Piece]) -> list[torch.layout | None]:
        # Blocks are numbered in the order of rows, and pieces in the order in which the blocks run.
        by_block = {id(block): pieces[index].facts[1] for index, block in self._chain.all_blocks().items()}
        droppable = self._chain.droppable
        return [
            self._gradients[number] if block < 0 else by_block[id(droppable[block])][number]
            for block, number in self._parameters
        ]


def block_kinds(short: ShortSteps | None) -> dict[tuple[str, int], Hashable]:
    """Return the kind of each block that may be left out, by the name of its sequence and its index in it."""
    if short is None or short.is_refused:
        return {}
    return {
        (name, index): (name, kind) for name, row in short._chain.rows.items() for index, kind in enumerate(row.kinds)
    }


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
