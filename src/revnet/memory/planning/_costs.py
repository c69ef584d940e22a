"""Count the costs of each policy at each unit, by running the step on fake tensors under several mixtures of policies.

Each probe is a step with one policy per unit. Together, the probes of the policies show every unit under each of its
policies, followed by each policy of the next unit: the bytes that a unit holds depend on the next one, since both may
hold the same stream. Among equal units, one shows each pair for all of them. The variants of `Reverse`, which differ
only in what they hold and keep, need one probe each (`_variant_costs`).

Times come from the probes with one policy everywhere. In a mixture, work that is done once for a row of reversed
blocks, such as comparing a rebuilt stream with a sample, would be charged to every short row.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import nn

from revnet.memory.planning._search import ChainCosts
from revnet.memory.planning._units import UnitInModel, assign
from revnet.memory.planning._variant_costs import (
    HoldMixtures,
    SpanCounts,
    VariantSlots,
    VariantTiming,
    extend_bytes,
    is_reversed,
    with_variants,
)
from revnet.memory.step._run_step import StepResult
from revnet.memory.step._step_log import Integers, StepLog
from revnet.nn import AbstractPolicy

_UNSEEN = -1
"""Bytes of a pair of choices that no probe has shown."""
Seconds = Callable[[Integers, Integers], npt.NDArray[np.float64]]
"""Function from floating-point operations and moved bytes to the seconds of each operation."""


class CountedCosts(NamedTuple):
    """Costs of a chain of units."""

    units: list[UnitInModel]
    """The units with all their choices."""
    chain: ChainCosts
    excess_bytes: int
    """Largest number of bytes by which the chain's peak exceeded the true peak of a probe.

    The chain only models direct neighbors; units farther away have a small effect too.
    """
    variants: VariantTiming | None = None
    """How to find the times of the variants of `Reverse`; None without variants."""


@dataclass(frozen=True, eq=False)
class UnitSpans:
    """Division of a step into spans, one per unit, from its beginning to the beginning of the next unit.

    Span 0 is the part before the first unit. The part after the last unit belongs to its span.
    """

    of_event: Integers
    """(events,) Span that contains the event."""
    of_storage: Integers
    """(storages,) Span that contains the event that created the storage."""


def count_costs(
    model: nn.Module,
    units: Sequence[UnitInModel],
    run: Callable[[], StepResult],
    seconds: Seconds,
    *,
    constant_bytes: int,
    floor: int,
    kinds: Sequence[Hashable] | None = None,
    adds_variants: bool = False,
) -> CountedCosts:
    """Count the costs of a chain: the part before the first unit, as a unit with one choice, and all units.

    Args:
        model: The model; its policies are changed.
        units: Units in the order in which they run.
        run: Function that runs a step of the model and records it.
        seconds: Function that estimates the time of operations.
        constant_bytes: Bytes alive during the whole step.
        floor: Peak that no policy lowers, such as the peak of the optimizer's step.
        kinds: Equal values for equal units. By default, all units differ.
        adds_variants: Whether to add variants of `Reverse()` to the choices of the units.
    """
    prober = _Prober(model, units, run, seconds, constant_bytes)
    costs = _count_policies(prober, units, kinds or range(len(units)), constant_bytes, floor)
    timing = None
    if adds_variants and any(map(is_reversed, units)):
        units, costs, timing = _add_variants(prober, units, costs, seconds)
    return CountedCosts(list(units), costs, prober.excess_bytes(units, costs), timing)


class _Prober:
    """Runs the step under mixtures of policies, and remembers their peaks."""

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[UnitInModel],
        run: Callable[[], StepResult],
        seconds: Seconds,
        constant_bytes: int,
    ):
        self._model, self._units, self._run, self._seconds = model, units, run, seconds
        self._constant_bytes = constant_bytes
        self._counts: dict[tuple[AbstractPolicy, ...], SpanCounts] = {}
        self._last: tuple[tuple[AbstractPolicy, ...], StepLog] | None = None

    def count(self, policies: Sequence[AbstractPolicy]) -> SpanCounts:
        """Return the costs of each span of a step in which the units have these policies."""
        key = tuple(policies)
        if key not in self._counts:
            log = self.log(policies)
            self._counts[key] = _count(log, find_unit_spans(log, self._units), len(self._units) + 1, self._seconds)
        return self._counts[key]

    def log(self, policies: Sequence[AbstractPolicy]) -> StepLog:
        """Return the log of a step in which the units have these policies."""
        key = tuple(policies)
        if self._last is None or self._last[0] != key:
            assign(self._model, self._units, policies)
            self._last = key, self._run().log
        return self._last[1]

    def excess_bytes(self, units: Sequence[UnitInModel], costs: ChainCosts) -> int:
        """Return by how many bytes the peak of the chain exceeds the true peak of a probe, at most."""
        excess = 0
        for policies, counts in self._counts.items():
            peak = self._constant_bytes + int(counts.peaks.max())
            if all(policy in unit.choices for unit, policy in zip(units, policies, strict=True)):
                choices = [unit.choices.index(policy) for unit, policy in zip(units, policies, strict=True)]
                excess = max(excess, costs.peak([0, *choices]) - max(peak, costs.floor))
        return excess


def _count_policies(
    prober: _Prober, units: Sequence[UnitInModel], kinds: Sequence[Hashable], constant_bytes: int, floor: int
) -> ChainCosts:
    """Count the costs of the choices without variants, from probes that contain each pair of neighbors."""
    num_choices = [1, *[len(unit.choices) for unit in units]]
    nexts = [*num_choices[1:], 1]
    held = [np.full(shape, _UNSEEN, np.int64) for shape in zip(num_choices, nexts, strict=True)]
    transient = [np.zeros(count, np.int64) for count in num_choices]
    more: dict[Hashable, Integers] = {}
    times = [np.zeros(count) for count in num_choices]
    uniform = _uniform_probes(num_choices[1:])
    pairs = list(pairwise([None, *kinds, None]))
    mixtures = list(_needed(probes(num_choices[1:]), uniform, pairs))
    all_counts = {
        tuple(choices): prober.count([unit.choices[choice] for unit, choice in zip(units, choices, strict=True)])
        for choices in [*mixtures, *reversed(uniform)]
    }
    for choices in [*uniform, *mixtures]:
        counts = all_counts[tuple(choices)]
        of_probe = counts.transient
        for index, (pair, (choice, after)) in enumerate(zip(pairs, pairwise([0, *choices, 0]), strict=True)):
            # The maximum over all probes, since a policy may cost less next to some neighbors.
            held[index][choice, after] = max(held[index][choice, after], counts.held[index])
            if choices in uniform:
                transient[index][choice] = of_probe[index]
                times[index][choice] = counts.seconds[index]
            else:
                at_pair = more.setdefault(pair, np.zeros(num_choices[index], np.int64))
                at_pair[choice] = max(at_pair[choice], of_probe[index] - transient[index][choice])
    _copy_unseen(held, pairs)
    transient = [own + more.get(pair, 0) for pair, own in zip(pairs, transient, strict=True)]
    return ChainCosts(held, transient, times, base=constant_bytes, floor=floor, fixed_seconds=0.0)


def _needed(
    mixtures: Sequence[list[int]], uniform: Sequence[list[int]], pairs: Sequence[Hashable]
) -> Iterator[list[int]]:
    """Return the mixtures that show a pair of choices at a pair of kinds for the first time."""

    def shown(choices: list[int]) -> set[Hashable]:
        return set(zip(pairs, pairwise([0, *choices, 0]), strict=True))

    seen = set[Hashable]().union(*map(shown, uniform))
    for choices in mixtures:
        new = shown(choices)
        if not new <= seen:
            seen |= new
            yield choices


def _copy_unseen(held: Sequence[Integers], pairs: Sequence[Hashable]) -> None:
    """Give units the bytes of equal units for pairs of choices that no probe showed.

    Equal units with equal neighbors hold the same bytes, except at an end of the chain. There, the difference is taken
    from pairs of equal choices, which all units have shown.
    """
    known: dict[Hashable, Integers] = {}
    for pair, own in zip(pairs, held, strict=True):
        known[pair] = np.maximum(known[pair], own) if pair in known else own.copy()
    for pair, own in zip(pairs, held, strict=True):
        for choice, after in zip(*np.nonzero(own == _UNSEEN), strict=True):
            alike = min(choice, own.shape[1] - 1)
            own[choice, after] = max(0, known[pair][choice, after] + own[choice, alike] - known[pair][choice, alike])


def _add_variants(
    prober: _Prober, units: Sequence[UnitInModel], costs: ChainCosts, seconds: Seconds
) -> tuple[list[UnitInModel], ChainCosts, VariantTiming]:
    """Add variants of `Reverse()` to the choices, with their costs."""
    first = _uniform_probes([len(unit.choices) for unit in units])[0]
    base = [unit.choices[choice] for unit, choice in zip(units, first, strict=True)]
    without, log = prober.count(base), prober.log(base)
    event_seconds = seconds(log.flops, log.moved_bytes)
    mixtures = HoldMixtures(units, base)
    counts = [prober.count(policies) for policies in mixtures.policies()]
    hold_bytes = mixtures.bytes(without, counts)
    hold_seconds = mixtures.seconds(without.seconds, [count.seconds for count in counts])
    extended, last_entries = with_variants(units, log, event_seconds, hold_bytes, hold_seconds)
    slots = VariantSlots(extended, base)
    counts_of_slots = [prober.count(policies) for policies in slots.policies()]
    own_bytes = slots.own_bytes(without, counts_of_slots, hold_bytes)
    held, transient = extend_bytes(costs, extended, own_bytes, hold_bytes, counts_of_slots)
    timing = VariantTiming(base, mixtures, slots, last_entries)
    times = timing.seconds(
        [unit_seconds[:, 0] for unit_seconds in costs.seconds],
        without.seconds,
        [count.seconds for count in counts],
        [count.seconds for count in counts_of_slots],
    )
    return extended, ChainCosts(held, transient, times, costs.base, costs.floor, costs.fixed_seconds), timing


def probes(num_choices: Sequence[int]) -> list[list[int]]:
    """Return mixtures that contain, for every unit, each pair of its choice and the next unit's choice.

    These are n * n mixtures, where n is the largest number of choices of a unit. All of them follow one cyclic
    sequence, in which every ordered pair of choices occurs once, and each starts one position later.
    """
    most = max(num_choices, default=0)
    cycle = _all_pairs(most)
    return [
        # A unit with fewer choices has its first one instead of those that it lacks.
        [max(0, cycle[(index + start) % len(cycle)] - (most - count)) for index, count in enumerate(num_choices)]
        for start in range(len(cycle))
    ]


def _uniform_probes(num_choices: Sequence[int]) -> list[list[int]]:
    """Return one mixture per choice, which all units have; a unit with fewer choices has its first one instead."""
    most = max(num_choices, default=0)
    return [[max(0, choice - (most - count)) for count in num_choices] for choice in range(most)]


def find_unit_spans(log: StepLog, units: Sequence[UnitInModel]) -> UnitSpans:
    """Divide a step into the spans of its units."""
    calls = {id(call.module): call for call in log.calls}
    firsts = [calls[id(unit.functions[0])] for unit in units]
    is_forward = np.arange(log.num_events) <= log.forward_end
    by_event = np.searchsorted([call.start_event for call in firsts], np.arange(log.num_events), side="right")
    by_sequence = np.searchsorted([call.start_sequence for call in firsts], log.sequence, side="right")
    of_event = np.where(is_forward, by_event, by_sequence).astype(np.int64)
    return UnitSpans(of_event, of_event[log.births])


def _count(log: StepLog, spans: UnitSpans, num_spans: int, seconds: Seconds) -> SpanCounts:
    held = np.zeros(num_spans, np.int64)
    np.add.at(held, spans.of_storage[log.is_held], log.sizes[log.is_held])
    peaks = np.zeros(num_spans, np.int64)
    np.maximum.at(peaks, spans.of_event, log.live_bytes)
    times = np.zeros(num_spans)
    np.add.at(times, spans.of_event, seconds(log.flops, log.moved_bytes))
    return SpanCounts(held, peaks, times)


def _all_pairs(num_choices: int) -> list[int]:
    """Return a cyclic sequence in which each ordered pair of choices occurs once."""
    cycle = []
    for first in range(num_choices):
        cycle.append(first)
        for second in range(first + 1, num_choices):
            cycle += [first, second]
    return cycle
