"""The chain of units of a model, and the model with fewer blocks."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from revnet._torch_internals import has_global_module_hook
from revnet.memory.repeats._block_kinds import kinds_of_blocks
from revnet.memory.repeats._frame import NUM_HOLDS, Label, NotRepeatedError, with_held_before
from revnet.memory.step._step_log import Call, StepLog
from revnet.nn import AbstractPolicy, HasPolicies, Reverse, ReversibleSequential
from revnet.nn._whole_model import policy_holders

FEWEST = 8
"""Smallest number of equal blocks for which leaving some out saves time."""
_HEAD = "head"


@dataclass(frozen=True, eq=False)
class Row:
    """A sequence whose blocks may be left out."""

    sequence: ReversibleSequential
    blocks: list[nn.Module]
    kinds: list[int]
    """A number for each block, which is the same for equal blocks."""

    @cached_property
    def by_kind(self) -> dict[int, list[nn.Module]]:
        """The blocks of each kind, in order."""
        blocks: dict[int, list[nn.Module]] = {}
        for block, kind in zip(self.blocks, self.kinds, strict=True):
            blocks.setdefault(kind, []).append(block)
        return blocks

    @cached_property
    def roles(self) -> list[str]:
        """Names of the first functions of a block."""
        return [half_block.role for half_block in self.blocks[0].half_blocks()][:NUM_HOLDS]  # type: ignore[operator]

    def held_by(self, policy: AbstractPolicy) -> tuple[int, ...]:
        """Return the numbers of the functions whose input streams a policy holds."""
        if not isinstance(policy, Reverse):
            return ()
        return tuple([number for number, role in enumerate(self.roles) if policy.holds(role)])


def find_rows(model: nn.Module) -> dict[str, Row]:
    """Return the sequences with many equal blocks, by name."""
    # The step refuses what is not a module.
    if not isinstance(model, nn.Module) or has_global_module_hook():
        return {}
    rows: dict[str, Row] = {}
    inside: set[int] = set()
    for name, sequence in model.named_modules():
        if type(sequence) is not ReversibleSequential or id(sequence) in inside or len(sequence) < FEWEST:
            continue
        # With a tolerance, values decide which blocks hold a keyframe. Policies inside blocks could differ later.
        blocks = list(sequence.blocks)
        if sequence.tolerance is not None or any(
            isinstance(module, HasPolicies) for block in blocks for module in block.modules()
        ):
            continue
        if len(set(map(id, blocks))) < len(blocks) or "blocks" in sequence.__dict__:
            continue
        kinds = kinds_of_blocks(model, sequence)
        if max(Counter(kinds).values()) >= FEWEST:
            rows[name] = Row(sequence, blocks, kinds)
            inside |= {id(module) for module in sequence.modules()}
    return rows


@dataclass(frozen=True)
class Position:
    """A position of the chain: a block of a row, or another unit with a policy."""

    holder: str
    index: int
    """Index of the unit in its holder."""


class BlockChain:
    """The units of a model in the order in which they run, of which a few blocks can stand for all.

    Position 0 is the part before the first unit.

    Args:
        model: The model.
        rows: The sequences whose blocks may be left out.
    """

    def __init__(self, model: nn.Module, rows: dict[str, Row]):
        self._model, self.rows = model, rows
        self._holders = policy_holders(model)
        self._policies: list[AbstractPolicy] = []
        self.positions: list[Position | None] = []
        """None stands for the part before the first unit."""

    @property
    def droppable(self) -> list[nn.Module]:
        """All blocks of rows."""
        return [block for row in self.rows.values() for block in row.blocks]

    def discover(self, log: StepLog) -> None:
        """Find the order of the units from a step with at least one block of each row.

        Raises:
            NotRepeatedError: The model does not run its rows as a whole.
        """
        calls = {id(call.module): call for call in log.calls}
        num_calls = Counter(id(call.module) for call in log.calls)
        starts: list[tuple[int, str, int]] = []
        for name, holder in self._holders.items():
            if name in self.rows:
                if num_calls[id(holder)] != 1:
                    raise NotRepeatedError
                starts.append((calls[id(holder)].start_event, name, -1))
                continue
            for index, unit in enumerate(holder.policy_units):
                first = unit.functions[0]
                if num_calls[id(first)] == 1:
                    starts.append((calls[id(first)].start_event, name, index))
        self.positions = [None]
        for _, name, index in sorted(starts):
            if name in self.rows:
                self.positions += [Position(name, block) for block in range(len(self.rows[name].blocks))]
            else:
                self.positions.append(Position(name, index))

    def labels(self) -> list[Label]:
        """Return a label for each position, from its kind of block and its policy."""
        policies = {name: holder.policies for name, holder in self._holders.items()}
        labels = [Label(_HEAD, self._others(policies), 0)]
        for position in self.positions[1:]:
            assert position is not None
            row = self.rows.get(position.holder)
            kind = -position.index - 1 if row is None else row.kinds[position.index]
            policy = policies[position.holder][position.index]
            number = self._number(policy)
            # Neighboring blocks with any `Reverse` form one chain.
            family = -1 if type(policy) is Reverse else number
            held = () if row is None else row.held_by(policy)
            labels.append(Label(position.holder, kind, number, family, held))
        return with_held_before(labels)

    def _others(self, policies: dict[str, tuple[AbstractPolicy, ...]]) -> Hashable:
        """Return the policies of the units that are not in the chain."""
        inside = {(position.holder, position.index) for position in self.positions if position is not None}
        return tuple(
            (name, index, self._number(policy))
            for name, own in policies.items()
            if name not in self.rows
            for index, policy in enumerate(own)
            if (name, index) not in inside
        )

    def _number(self, policy: AbstractPolicy) -> int:
        if policy not in self._policies:
            self._policies.append(policy)
        return self._policies.index(policy)

    @property
    def fixed(self) -> list[int]:
        """Positions that cannot be left out: all but blocks of rows."""
        return [
            index
            for index, position in enumerate(self.positions)
            if position is None or position.holder not in self.rows
        ]

    def all_blocks(self) -> dict[int, nn.Module]:
        """Return the blocks of rows by their position."""
        return {
            index: self.rows[position.holder].blocks[position.index]
            for index, position in enumerate(self.positions)
            if position is not None and position.holder in self.rows
        }

    @property
    def ends(self) -> list[int]:
        """The last position of each row, which is shown so that no row is empty."""
        last = {position.holder: index for index, position in enumerate(self.positions) if position is not None}
        return [last[name] for name in self.rows]

    def blocks_for(self, shown: Sequence[int]) -> dict[int, nn.Module]:
        """Return for each shown position of a row a block of its kind: the first ones, in order."""
        num_used = Counter[Any]()
        blocks = {}
        for index in shown:
            position = self.positions[index]
            if position is not None and position.holder in self.rows:
                row = self.rows[position.holder]
                kind = row.kinds[position.index]
                blocks[index] = row.by_kind[kind][num_used[position.holder, kind]]
                num_used[position.holder, kind] += 1
        return blocks

    @contextmanager
    def showing(self, blocks: dict[int, nn.Module]) -> Iterator[None]:
        """Leave out all blocks of rows but these, by position."""
        with ExitStack() as stack:
            for name, row in self.rows.items():
                own = [index for index in blocks if self.positions[index].holder == name]  # type: ignore[union-attr]
                policies = row.sequence.policies
                chosen = tuple(policies[self.positions[index].index] for index in own)  # type: ignore[union-attr]
                stack.enter_context(_with_blocks(row.sequence, [blocks[index] for index in own], chosen))
            yield

    @contextmanager
    def showing_first(self) -> Iterator[list[nn.Module]]:
        """Leave out all blocks of rows but the first two; yield the blocks that remain."""
        with ExitStack() as stack:
            for row in self.rows.values():
                stack.enter_context(_with_blocks(row.sequence, row.blocks[:2], row.sequence.policies[:2]))
            yield [block for row in self.rows.values() for block in row.blocks[:2]]

    def first_calls(self, shown: Sequence[int], blocks: dict[int, nn.Module], log: StepLog) -> list[Call]:
        """Return the first call of each shown position after position 0.

        Raises:
            NotRepeatedError: The units did not run once, in the order of the chain.
        """
        calls = {id(call.module): call for call in log.calls}
        num_calls = Counter(id(call.module) for call in log.calls)
        firsts = []
        for index in shown[1:]:
            position = self.positions[index]
            assert position is not None
            holder = self._holders[position.holder]
            if index in blocks:
                functions: Sequence[nn.Module] = [half.function for half in blocks[index].half_blocks()]  # type: ignore[operator]
            else:
                functions = holder.policy_units[position.index].functions
            if num_calls[id(functions[0])] != 1:
                raise NotRepeatedError
            firsts.append(calls[id(functions[0])])
        starts = [call.start_event for call in firsts]
        is_whole = all(num_calls[id(row.sequence)] == 1 for row in self.rows.values())
        if starts != sorted(starts) or not is_whole:
            raise NotRepeatedError
        return firsts


@contextmanager
def _with_blocks(
    sequence: ReversibleSequential, blocks: Sequence[nn.Module], policies: Sequence[AbstractPolicy]
) -> Iterator[None]:
    """Let a sequence run other blocks."""
    before, before_policies = sequence._modules["blocks"], sequence._policies
    sequence._modules["blocks"] = nn.ModuleList(blocks)
    sequence._policies = tuple(policies)
    try:
        yield
    finally:
        sequence._modules["blocks"], sequence._policies = before, before_policies
