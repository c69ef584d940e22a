"""Find variants of `Reverse` for each unit: what it may hold and keep, from the least memory to the least time.

A *move* holds one stream, or keeps the outputs of one operator. Beginning with no moves, the one that saves the most
time per byte is added, until none saves time. The bytes and seconds of keeping an operator are its own, in the log of a
step. Those of holding a stream come from a step in which all units hold it (`_variant_costs`).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from revnet.engine import HalfBlock
from revnet.memory.planning._units import UnitInModel
from revnet.memory.step._step_log import Integers, StepLog
from revnet.nn import Reverse
from revnet.nn.policies._keep_spec import KEEP_NAMES

MOST_VARIANTS, FEW_VARIANTS = 10, 4
"""Largest number of variants of one unit, and of each of many equal ones."""
MANY_UNITS = 100
"""Number of equal units from which on mixtures of a few variants are as dense as more variants, and faster to find."""


@dataclass(frozen=True)
class Hold:
    """A stream of a unit that may be held."""

    role: str
    """Name of the residual function that reads it."""
    enters: bool
    """Whether it is the result of an earlier unit, whose span then contains its bytes."""
    leaves: bool
    """Whether a later unit updates it, whose span then contains the time that is saved."""
    updater: str
    """Name of the residual function that updates it next, in this unit or the next one."""


@dataclass(frozen=True)
class Move:
    """One stream that is held, or the outputs of one operator that are kept."""

    num_bytes: int
    seconds: float
    """Time that it saves."""
    hold: str = ""
    """Name of the residual function whose input is held, or empty."""
    keep: str = ""
    """Entry of `Reverse(keep=...)`, or empty."""
    replaces: str = ""
    """Entry that is useless if this stream is held, or empty."""


def find_holds(half_blocks: Sequence[HalfBlock]) -> tuple[Hold, ...]:
    """Return the streams that a unit may hold, one for each of its functions.

    If functions have the same name, or one reads several streams, one name would hold several streams, so there are
    none.
    """
    if len({half_block.role for half_block in half_blocks}) < len(half_blocks):
        return ()
    if any(len(half_block.sources) > 1 for half_block in half_blocks):
        return ()
    holds = []
    for index, half_block in enumerate(half_blocks):
        before, after = half_blocks[:index], half_blocks[index + 1 :]
        updaters = [other.role for other in (*after, *before) if other.target == half_block.source]
        holds.append(
            Hold(
                half_block.role,
                enters=all(other.target != half_block.source for other in before),
                leaves=all(other.target != half_block.source for other in after),
                updater=updaters[0] if updaters else "",
            )
        )
    return tuple(holds)


class KeepMoves:
    """The operators that units may keep.

    Args:
        log: Log of a step.
        seconds: (events,) Time of each event.
    """

    def __init__(self, log: StepLog, seconds: npt.NDArray[np.float64]):
        self._seconds, self._kinds = seconds, log.keep_kinds
        self._events = np.flatnonzero(log.keep_kinds[: log.forward_end])
        self._bytes = np.zeros(log.num_events, np.int64)
        np.add.at(self._bytes, log.births, log.sizes)
        self._calls = {id(call.module): call for call in log.calls}

    def of(self, unit: UnitInModel) -> tuple[Move, ...]:
        """Return the moves of a unit that keep operators, in the order in which the operators run."""
        moves: dict[str, Move] = {}
        for half_block in unit.half_blocks:
            # The name of a function in a list has a dot, which an entry cannot contain.
            if not half_block.role.isidentifier():
                continue
            call = self._calls[id(half_block.function)]
            first, stop = np.searchsorted(self._events, [call.start_event, call.stop_event])
            for move in self._of_function(half_block.role, self._events[first:stop]):
                before = moves.get(move.keep)
                moves[move.keep] = (
                    move
                    if before is None
                    else replace(
                        move, num_bytes=move.num_bytes + before.num_bytes, seconds=move.seconds + before.seconds
                    )
                )
        return tuple(moves.values())

    def _of_function(self, role: str, events: Integers) -> Iterator[Move]:
        counts = Counter[int]()
        for event in events.tolist():
            kind = int(self._kinds[event])
            name = KEEP_NAMES[abs(kind) - 1]
            if kind > 0:
                yield Move(
                    int(self._bytes[event]), float(self._seconds[event]), keep=f"{role}.{name}.{counts[abs(kind)]}"
                )
            counts[abs(kind)] += 1


def last_entry(moves: Sequence[Move], role: str) -> str:
    """Return the entry of the last operator of a function; an empty string if it has none."""
    return next((move.keep for move in reversed(moves) if move.keep.partition(".")[0] == role), "")


def find_variants(moves: Sequence[Move], num_units: int = 1) -> tuple[Reverse, ...]:
    """Return variants of `Reverse`, each with more memory and less time than the one before.

    Args:
        moves: The moves, in the order in which the policies list them.
        num_units: Number of equal units.
    """
    most = MOST_VARIANTS if num_units < MANY_UNITS else FEW_VARIANTS
    chosen: list[Move] = []
    variants: list[list[Move]] = []
    while best := _best_addition(chosen, moves):
        chosen = best
        variants.append(chosen)
    if len(variants) > most:
        at = np.linspace(0, len(variants) - 1, most).round().astype(int)
        variants = [variants[index] for index in at]
    return tuple([_policy(moves, variant) for variant in variants])


def _best_addition(chosen: list[Move], moves: Sequence[Move]) -> list[Move] | None:
    """Return the chosen moves with the one that saves the most time per additional byte; None if none does."""
    best, best_price = None, 0.0
    useless = {move.replaces for move in chosen}
    for move in moves:
        if move in chosen or move.keep in useless - {""}:
            continue
        after = [*[other for other in chosen if not other.keep or other.keep != move.replaces], move]
        seconds = _seconds(after) - _seconds(chosen)
        num_bytes = _num_bytes(after) - _num_bytes(chosen)
        # A tie keeps the move that comes first.
        price = seconds / max(num_bytes, 1)
        if price > best_price * (1 + 1e-9):
            best, best_price = after, price
    return best


def _seconds(moves: Sequence[Move]) -> float:
    return sum(move.seconds for move in moves)


def _num_bytes(moves: Sequence[Move]) -> int:
    return sum(move.num_bytes for move in moves)


def _policy(moves: Sequence[Move], chosen: Sequence[Move]) -> Reverse:
    in_order = [move for move in moves if move in chosen]
    hold = tuple([move.hold for move in in_order if move.hold])
    all_calls = Counter(_without_number(move.keep) for move in moves)
    kept_calls = Counter(_without_number(move.keep) for move in in_order)
    keep = [
        name if kept_calls[name := _without_number(move.keep)] == all_calls[name] else move.keep
        for move in in_order
        if move.keep
    ]
    return Reverse(hold=hold, keep=tuple(dict.fromkeys(keep)))


def _without_number(entry: str) -> str:
    """Return the entry that means all calls of its operator in the same function."""
    return entry.rpartition(".")[0]
