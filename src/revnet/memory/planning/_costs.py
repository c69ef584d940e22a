"""Count the costs of each policy at each unit, by running the step on fake tensors under several mixtures of policies.

Nothing here knows what a policy does, so a new policy needs no change. Each probe is a step with one policy per unit.
Together, the probes show every unit under each of its policies, followed by each policy of the next unit: the bytes
that a unit holds depend on the next one, since both may hold the same stream.

Times come from the probes with one policy everywhere. In a mixture, work that is done once for a row of reversed
blocks, such as comparing a rebuilt stream with a sample, would be charged to every short row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import nn

from revnet.memory.planning._search import ChainCosts
from revnet.memory.planning._units import UnitInModel, assign
from revnet.memory.step._run_step import StepResult
from revnet.memory.step._step_log import Integers, StepLog

Seconds = Callable[[Integers, Integers], npt.NDArray[np.float64]]
"""Function from floating-point operations and moved bytes to the seconds of each operation."""


class CountedCosts(NamedTuple):
    """Costs of a chain of units."""

    chain: ChainCosts
    excess_bytes: int
    """Largest number of bytes by which the chain's peak exceeded the true peak of a probe.

    The chain only models direct neighbors; units farther away have a small effect too.
    """


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
) -> CountedCosts:
    """Count the costs of a chain: the part before the first unit, as a unit with one choice, and all units.

    Args:
        model: The model; its policies are changed.
        units: Units in the order in which they run.
        run: Function that runs a step of the model and records it.
        seconds: Function that estimates the time of operations.
        constant_bytes: Bytes alive during the whole step.
        floor: Peak that no policy lowers, such as the peak of the optimizer's step.
    """
    num_choices = [1, *[len(unit.choices) for unit in units]]
    nexts = [*num_choices[1:], 1]
    held = [np.zeros(shape, np.int64) for shape in zip(num_choices, nexts, strict=True)]
    transient = [np.zeros(count, np.int64) for count in num_choices]
    times = [np.zeros(count) for count in num_choices]
    peaks = []
    uniform = _uniform_probes(num_choices[1:])
    for choices in [*probes(num_choices[1:]), *uniform]:
        assign(model, units, [unit.choices[choice] for unit, choice in zip(units, choices, strict=True)])
        log = run().log
        spans = find_unit_spans(log, units)
        of_probe = _count(log, spans, len(num_choices), seconds)
        peaks.append(([0, *choices], constant_bytes + max(of_probe.peaks)))
        before = 0
        for index, (choice, after) in enumerate(zip([0, *choices], [*choices, 0], strict=True)):
            # The maximum over all probes, since a policy may cost less next to some neighbors.
            held[index][choice, after] = max(held[index][choice, after], of_probe.held[index])
            transient[index][choice] = max(transient[index][choice], of_probe.peaks[index] - before)
            if choices in uniform:
                times[index][choice] = of_probe.seconds[index]
            before += of_probe.held[index]
    costs = ChainCosts(held, transient, times, base=constant_bytes, floor=floor, fixed_seconds=0.0)
    excess = max((costs.peak(choices) - max(peak, floor) for choices, peak in peaks), default=0)
    return CountedCosts(costs, excess)


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


@dataclass(frozen=True, eq=False)
class _Counts:
    """Costs of each span in one probe."""

    held: list[int]
    peaks: list[int]
    seconds: list[float]


def _count(log: StepLog, spans: UnitSpans, num_spans: int, seconds: Seconds) -> _Counts:
    held = np.zeros(num_spans, np.int64)
    np.add.at(held, spans.of_storage[log.is_held], log.sizes[log.is_held])
    peaks = np.zeros(num_spans, np.int64)
    np.maximum.at(peaks, spans.of_event, log.live_bytes)
    times = np.zeros(num_spans)
    np.add.at(times, spans.of_event, seconds(log.flops, log.moved_bytes))
    return _Counts(held.tolist(), peaks.tolist(), times.tolist())


def _all_pairs(num_choices: int) -> list[int]:
    """Return a cyclic sequence in which each ordered pair of choices occurs once."""
    cycle = []
    for first in range(num_choices):
        cycle.append(first)
        for second in range(first + 1, num_choices):
            cycle += [first, second]
    return cycle
