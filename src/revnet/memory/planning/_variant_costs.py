"""Count the costs of the variants of `Reverse`, from one step for each of them.

Variants differ only by what they hold and keep, and neighbors add up: a unit that holds the stream that enters it adds
its bytes to the unit before, which made the stream, and a unit that holds a stream that the next unit updates saves
time there. So no step is needed for each pair of variants. First, all units hold the streams of one name. This shows
what each stream adds to its neighbors. Then each variant runs in all units; the rest is its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from revnet.memory.planning._search import ChainCosts
from revnet.memory.planning._units import UnitInModel
from revnet.memory.planning._variants import Hold, KeepMoves, Move, find_holds, find_variants, last_entry
from revnet.memory.step._step_log import StepLog
from revnet.nn import AbstractPolicy, Reverse
from revnet.nn.policies._keep_spec import as_entries

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SpanCounts:
    """Costs of each span of a step. Span 0 is the part before the first unit."""

    held: npt.NDArray[np.int64]
    peaks: npt.NDArray[np.int64]
    seconds: _Array

    @property
    def transient(self) -> npt.NDArray[np.int64]:
        """The peaks without the bytes that earlier spans hold; zero for a span in which nothing runs."""
        transient: npt.NDArray[np.int64] = np.maximum(self.peaks - (np.cumsum(self.held) - self.held), 0)
        return transient


def is_reversed(unit: UnitInModel) -> bool:
    """Return whether the first choice of a unit is `Reverse()`."""
    return unit.choices[0] == Reverse()


class HoldMixtures:
    """Mixtures of policies in which all units hold one stream.

    Args:
        units: The units.
        base: Policies of the units if they hold nothing.
    """

    def __init__(self, units: Sequence[UnitInModel], base: Sequence[AbstractPolicy]):
        self._base = base
        self.mixtures: list[list[Hold | None]] = []
        """For each mixture, the stream that each unit holds. All of them enter or do not, and leave or do not."""
        holds = [find_holds(unit.half_blocks) if is_reversed(unit) else () for unit in units]
        for flags in [(True, False), (False, True), (True, True), (False, False)]:
            alike = [[hold for hold in own if (hold.enters, hold.leaves) == flags] for own in holds]
            for number in range(max(map(len, alike), default=0)):
                self.mixtures.append([own[number] if number < len(own) else None for own in alike])

    def policies(self) -> list[list[AbstractPolicy]]:
        """Return the policies of each mixture."""
        return [
            [policy if hold is None else Reverse(hold=hold.role) for policy, hold in zip(self._base, own, strict=True)]
            for own in self.mixtures
        ]

    def bytes(self, base: SpanCounts, counts: Sequence[SpanCounts]) -> "list[dict[Hold, int]]":
        """Return for each unit the bytes of each stream that it may hold."""
        result: list[dict[Hold, int]] = [{} for _ in self._base]
        for own, mixture in zip(self.mixtures, counts, strict=True):
            more = mixture.held - base.held
            for index, hold in enumerate(own):
                if hold is not None:
                    result[index][hold] = max(0, int(more[index + 1 - hold.enters]))
        return result

    def seconds(self, base: _Array, times: Sequence[_Array]) -> "list[dict[Hold, float]]":
        """Return for each unit the seconds that holding each stream saves, in the span where it saves them."""
        result: list[dict[Hold, float]] = [{} for _ in self._base]
        for own, mixture in zip(self.mixtures, times, strict=True):
            saved = np.append(base - mixture, 0.0)
            for index, hold in enumerate(own):
                if hold is not None:
                    result[index][hold] = max(0.0, float(saved[index + 1 + hold.leaves]))
        return result


def with_variants(
    units: Sequence[UnitInModel],
    log: StepLog,
    event_seconds: _Array,
    hold_bytes: "Sequence[dict[Hold, int]]",
    hold_seconds: "Sequence[dict[Hold, float]]",
) -> tuple[list[UnitInModel], list[dict[str, str]]]:
    """Return the units with variants of `Reverse` among their choices; equal units have equal variants.

    Also return, for each unit, the entry of the last operator of each function.
    """
    keeps = KeepMoves(log, event_seconds)
    groups: dict[tuple[tuple[Hold, ...], tuple[Move, ...]], list[int]] = {}
    for index, unit in enumerate(units):
        if is_reversed(unit) and unit.half_blocks:
            groups.setdefault((tuple(hold_bytes[index]), keeps.of(unit)), []).append(index)
    result = list(units)
    last_entries: list[dict[str, str]] = [{} for _ in units]
    for (holds, keep_moves), members in groups.items():
        moves = []
        for hold in holds:
            seconds = float(np.median([hold_seconds[index][hold] for index in members]))
            num_bytes = int(np.median([hold_bytes[index][hold] for index in members]))
            last = last_entry(keep_moves, hold.updater)
            # The updater is run again only up to the last tensor that autograd saved, which may be its end.
            is_useless = any(move.keep == last and move.seconds <= seconds * 1.001 for move in keep_moves)
            moves.append(Move(num_bytes, seconds, hold=hold.role, replaces=last if is_useless else ""))
        variants = find_variants([*moves, *keep_moves], len(members))
        for index in members:
            result[index] = units[index].with_variants(variants)
            last_entries[index] = {hold.updater: last_entry(keep_moves, hold.updater) for hold in holds}
    return result, last_entries


class VariantSlots:
    """Mixtures of policies in which each unit has the variant of one number.

    Args:
        units: The units, with variants.
        base: Policies of the units without variants.
    """

    def __init__(self, units: Sequence[UnitInModel], base: Sequence[AbstractPolicy]):
        self.units, self._base = units, base
        self.num_slots = max((unit.num_variants for unit in units), default=0)

    def policies(self) -> list[list[AbstractPolicy]]:
        """Return the policies of each mixture."""
        return [
            [
                unit.variants[slot] if slot < unit.num_variants else policy
                for unit, policy in zip(self.units, self._base, strict=True)
            ]
            for slot in range(self.num_slots)
        ]

    def own_bytes(
        self, base: SpanCounts, counts: Sequence[SpanCounts], hold_bytes: "Sequence[dict[Hold, int]]"
    ) -> list[list[int]]:
        """Return for each unit the bytes that each variant holds in its own span, more than the first choice."""
        result: list[list[int]] = [[] for _ in self.units]
        for policies, mixture in zip(self.policies(), counts, strict=True):
            more = mixture.held - base.held
            entering = [int(_entering((policy,), own)[0]) for policy, own in zip(policies, hold_bytes, strict=True)]
            for index, unit in enumerate(self.units):
                if len(result[index]) < unit.num_variants:
                    result[index].append(max(0, int(more[index + 1]) - [*entering, 0][index + 1]))
        return result

    def own_seconds(
        self, base: _Array, times: Sequence[_Array], hold_seconds: "Sequence[dict[Hold, float]]"
    ) -> list[list[float]]:
        """Return for each unit the seconds that each variant saves in its own span."""
        result: list[list[float]] = [[] for _ in self.units]
        for policies, mixture in zip(self.policies(), times, strict=True):
            saved = base - mixture
            leaving = [
                0.0,
                *[float(_leaving((policy,), own)[0]) for policy, own in zip(policies, hold_seconds, strict=True)],
            ]
            for index, unit in enumerate(self.units):
                if len(result[index]) < unit.num_variants:
                    result[index].append(max(0.0, float(saved[index + 1]) - leaving[index]))
        return result


@lru_cache
def _holding(choices: tuple[AbstractPolicy, ...], role: str) -> npt.NDArray[np.bool_]:
    """Return for each choice whether it holds the stream that a function reads."""
    return np.array([isinstance(policy, Reverse) and policy.holds(role) for policy in choices])


@lru_cache
def _running(choices: tuple[AbstractPolicy, ...], entry: str) -> npt.NDArray[np.bool_]:
    """Return for each choice whether it runs an operator again."""
    entries = {entry, entry.rpartition(".")[0]}
    return np.array([isinstance(policy, Reverse) and entries.isdisjoint(as_entries(policy.keep)) for policy in choices])


def _entering(choices: tuple[AbstractPolicy, ...], hold_bytes: "dict[Hold, int]") -> npt.NDArray[np.int64]:
    """Return the bytes that each choice adds to the span before its unit."""
    total = np.zeros(len(choices), np.int64)
    for hold, num_bytes in hold_bytes.items():
        if hold.enters:
            total += num_bytes * _holding(choices, hold.role)
    return total


def _leaving(choices: tuple[AbstractPolicy, ...], hold_seconds: "dict[Hold, float]") -> _Array:
    """Return the seconds that each choice saves in the next unit."""
    total = np.zeros(len(choices))
    for hold, seconds in hold_seconds.items():
        if hold.leaves:
            total += seconds * _holding(choices, hold.role)
    return total


def extend_bytes(
    costs: ChainCosts,
    units: Sequence[UnitInModel],
    own_bytes: Sequence[Sequence[int]],
    hold_bytes: "Sequence[dict[Hold, int]]",
    slots: Sequence[SpanCounts],
) -> tuple[list[npt.NDArray[np.int64]], list[npt.NDArray[np.int64]]]:
    """Return the bytes that units hold and their transient bytes, for all choices.

    Args:
        costs: Costs of the choices without variants.
        units: The units, with variants.
        own_bytes: Bytes that each variant adds to its own unit.
        hold_bytes: Bytes of the streams that each unit may hold.
        slots: Counts of the mixtures with variants.
    """
    held, transient = [], []
    kinds = [np.zeros(1, np.int64), *map(_kind_of_choice, units), np.zeros(1, np.int64)]
    for index in range(len(units) + 1):  # 0 is the part before the first unit
        own = np.zeros(len(kinds[index]), np.int64)
        entering = np.zeros(len(kinds[index + 1]), np.int64)
        before = costs.transient[index][kinds[index]]
        if index > 0:
            count = units[index - 1].num_variants
            own[1 : 1 + count] = own_bytes[index - 1]
            before[1 : 1 + count] = [slots[slot].transient[index] for slot in range(count)]
        if index < len(units):
            entering += _entering(units[index].choices, hold_bytes[index])
        held.append(costs.held[index][np.ix_(kinds[index], kinds[index + 1])] + own[:, None] + entering)
        transient.append(np.maximum(before, 0))
    return held, transient


def extend_seconds(
    kind_seconds: Sequence[_Array],
    units: Sequence[UnitInModel],
    own_seconds: Sequence[Sequence[float]],
    hold_seconds: "Sequence[dict[Hold, float]]",
    last_entries: "Sequence[dict[str, str]]",
) -> list[_Array]:
    """Return the seconds of units for all choices, by choice and next choice.

    Args:
        kind_seconds: Seconds of the choices without variants.
        units: The units, with variants.
        own_seconds: Seconds that each variant saves in its own unit.
        hold_seconds: Seconds that holding each stream saves.
        last_entries: For each unit, the entry of the last operator of each function.
    """
    result = [kind_seconds[0][:, None].repeat(len(units[0].choices), axis=1)]
    for index, unit in enumerate(units):
        seconds = kind_seconds[index + 1][_kind_of_choice(unit)]
        seconds[1 : 1 + unit.num_variants] -= own_seconds[index]
        if index + 1 == len(units):
            result.append(np.maximum(seconds, 0.0)[:, None])
            continue
        following = units[index + 1].choices
        pairs = seconds[:, None].repeat(len(following), axis=1)
        for hold, saved in hold_seconds[index].items():
            if hold.leaves and saved:
                runs = _running(following, last_entries[index + 1].get(hold.updater, ""))
                pairs -= saved * np.outer(_holding(unit.choices, hold.role), runs)
        result.append(np.maximum(pairs, 0.0))
    return result


@dataclass(frozen=True, eq=False)
class VariantTiming:
    """The mixtures that show the times of variants."""

    base: list[AbstractPolicy]
    """Policies of the units without variants."""
    holds: HoldMixtures
    slots: VariantSlots
    last_entries: "list[dict[str, str]]"
    """For each unit, the entry of the last operator of each function."""

    def seconds(
        self, kind_seconds: Sequence[_Array], base: _Array, holds: Sequence[_Array], slots: Sequence[_Array]
    ) -> list[_Array]:
        """Return the seconds of units for all choices, by choice and next choice.

        Args:
            kind_seconds: Seconds of each unit for its choices without variants.
            base: Seconds of each span under the policies without variants.
            holds: The same for each mixture of `holds`.
            slots: The same for each mixture of `slots`.
        """
        hold_seconds = self.holds.seconds(base, holds)
        own_seconds = self.slots.own_seconds(base, slots, hold_seconds)
        return extend_seconds(kind_seconds, self.slots.units, own_seconds, hold_seconds, self.last_entries)


def _kind_of_choice(unit: UnitInModel) -> npt.NDArray[np.int64]:
    """Return for each choice the index of its kind, which for a variant is the index of the first choice."""
    return np.maximum(np.arange(len(unit.choices)) - unit.num_variants, 0)
