"""What each policy costs at each unit of a model: counted, by running the step on fake tensors under several mixtures.

Policies are taken as they come: nothing here knows what one does. Each probe is a step with a policy for every unit,
and the probes together show every unit under each policy, and before each policy of the unit after it, since two
neighbours may hold the same stream. How long a unit takes is seen among its like: what is done once for a row of blocks
that are reversed, such as comparing what was rebuilt with a sample, is not held against each of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import nn

from revnet.memory._log import Integers, StepLog
from revnet.memory._search import ChainCosts
from revnet.memory._step import StepResult
from revnet.memory._units import Unit, assign

Seconds = Callable[[Integers, Integers], npt.NDArray[np.float64]]
"""How long operations take, by their floating-point operations and the bytes that they move."""


class CountedCosts(NamedTuple):
    """What was counted."""

    chain: ChainCosts
    excess_bytes: int
    """By how much the chain's peak was above the true one in some probe: neighbours farther away matter a little."""


class Windows(NamedTuple):
    """The stretch of a step that belongs to a unit: from where it begins to where the next one does.

    Index 0 is what lies before the first unit; what lies behind the last one belongs to it.
    """

    of_event: Integers
    """(events,) The stretch in which an event lies."""
    of_storage: Integers
    """(storages,) The stretch whose forward pass made a storage."""


def count_costs(
    model: nn.Module,
    units: Sequence[Unit],
    run: Callable[[], StepResult],
    seconds: Seconds,
    *,
    constant_bytes: int,
    floor: int,
) -> "CountedCosts":
    """Count the costs of a chain: what lies before the first unit, as one with a single choice, and the units.

    Args:
        model: The model, whose policies are changed.
        units: In the order in which they run.
        run: Runs a step of the model and records it.
        seconds: How long operations take.
        constant_bytes: What is there all the time.
        floor: A peak that no policy lowers, such as that of the optimizer's step.
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
        windows = find_windows(log, units)
        of_probe = _count(log, windows, len(num_choices), seconds)
        peaks.append(([0, *choices], constant_bytes + max(of_probe.peaks)))
        before = 0
        for index, (choice, after) in enumerate(zip([0, *choices], [*choices, 0], strict=True)):
            # The most that was seen: a policy may cost less beside some neighbours.
            held[index][choice, after] = max(held[index][choice, after], of_probe.held[index])
            transient[index][choice] = max(transient[index][choice], of_probe.peaks[index] - before)
            if choices in uniform:
                times[index][choice] = of_probe.seconds[index]
            before += of_probe.held[index]
    costs = ChainCosts(held, transient, times, base=constant_bytes, floor=floor, fixed_seconds=0.0)
    excess = max((costs.peak(choices) - max(peak, floor) for choices, peak in peaks), default=0)
    return CountedCosts(costs, excess)


def probes(num_choices: Sequence[int]) -> list[list[int]]:
    """Mixtures in which every unit has each choice beside each one of the next unit's.

    With n the most choices of a unit, n * n of them: along a cyclic sequence in which every pair of choices occurs
    once, each starting one place later.
    """
    most = max(num_choices, default=0)
    cycle = _all_pairs(most)
    return [
        # A unit with fewer choices takes its last ones in the place of those that it lacks.
        [max(0, cycle[(place + start) % len(cycle)] - (most - count)) for place, count in enumerate(num_choices)]
        for start in range(len(cycle))
    ]


def _uniform_probes(num_choices: Sequence[int]) -> list[list[int]]:
    """One choice everywhere, for each; a unit with fewer takes its last ones."""
    most = max(num_choices, default=0)
    return [[max(0, choice - (most - count)) for count in num_choices] for choice in range(most)]


def find_windows(log: StepLog, units: Sequence[Unit]) -> Windows:
    """Divide a step between its units."""
    calls = {id(call.module): call for call in log.calls}
    firsts = [calls[id(unit.functions[0])] for unit in units]
    is_forward = np.arange(log.num_events) <= log.forward_end
    by_event = np.searchsorted([call.start_event for call in firsts], np.arange(log.num_events), side="right")
    by_sequence = np.searchsorted([call.start_sequence for call in firsts], log.sequence, side="right")
    of_event = np.where(is_forward, by_event, by_sequence).astype(np.int64)
    return Windows(of_event, of_event[log.births])


class _Counts(NamedTuple):
    """What one probe showed of each stretch."""

    held: list[int]
    peaks: list[int]
    seconds: list[float]


def _count(log: StepLog, windows: Windows, num_windows: int, seconds: Seconds) -> _Counts:
    held = np.zeros(num_windows, np.int64)
    np.add.at(held, windows.of_storage[log.is_held], log.sizes[log.is_held])
    peaks = np.zeros(num_windows, np.int64)
    np.maximum.at(peaks, windows.of_event, log.live_bytes)
    times = np.zeros(num_windows)
    np.add.at(times, windows.of_event, seconds(log.flops, log.moved_bytes))
    return _Counts(held.tolist(), peaks.tolist(), times.tolist())


def _all_pairs(num_choices: int) -> list[int]:
    """A cyclic sequence in which each ordered pair of choices occurs once."""
    cycle = []
    for first in range(num_choices):
        cycle.append(first)
        for second in range(first + 1, num_choices):
            cycle += [first, second]
    return cycle
