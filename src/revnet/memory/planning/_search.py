"""Choose an option for each unit of a chain: the exact trade-off between the peak memory of a step and its time.

This is pure arithmetic, independent of models and tensors.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int64]

# All bytes together stay below 2**53, so that floating-point numbers represent them exactly.
_MOST_BITS = 53
# More than the age of the universe. No sum of such times overflows.
_MOST_SECONDS = 1e18
# The slowest choices together take 2**52 ticks, so a tick is at most the rounding error of a floating-point sum.
_TICK_BITS = 52


@dataclass(frozen=True, eq=False)
class ChainCosts:
    """Costs of each choice, for units that run forward in a chain and backward in reverse order.

    With `p` the choice of a unit and `q` the choice of the next unit,

        peak = max(floor, base + max over i of (sum over j < i of held[j][p, q] + transient[i][p]))
        time = fixed_seconds + sum over i of seconds[i][p, q]

    Shape:
        held[i]: (P, Q), for P choices of unit i, and Q of unit i + 1; Q is 1 for the last unit.
        transient[i]: (P,).
        seconds[i]: (P, Q), or (P,) if the time does not depend on the next unit.

    Raises:
        TypeError: Bytes are not integers.
        ValueError: Shapes do not fit together, or a cost is negative, infinite, or too large to add up exactly.
    """

    held: list[_Ints]
    """Bytes that a unit holds between its forward and its backward pass."""
    transient: list[_Ints]
    """Peak bytes while a unit runs, with the bytes that it holds, without the bytes that earlier units hold."""
    seconds: list[npt.NDArray[np.float64]]
    """Time of a unit, forward and backward together. It has the shape (P, Q) once the costs are made."""
    base: int
    """Bytes that are always alive."""
    floor: int
    """Peak that no choice lowers, such as the peak of the optimizer's step."""
    fixed_seconds: float
    """Time that does not depend on the choices."""

    def __post_init__(self) -> None:
        if not len(self.held) == len(self.transient) == len(self.seconds):
            raise ValueError(
                f"`held` (of {len(self.held)} units), `transient` (of {len(self.transient)}) and `seconds` (of "
                f"{len(self.seconds)}) must have the same length; give each one array per unit."
            )
        for name in ("held", "transient"):
            costs = [_bytes(value, f"{name}[{index}]") for index, value in enumerate(getattr(self, name))]
            object.__setattr__(self, name, costs)
        seconds = [_seconds(value, f"seconds[{index}]") for index, value in enumerate(self.seconds)]
        object.__setattr__(self, "seconds", seconds)
        object.__setattr__(self, "base", int(_bytes(self.base, "base")))
        object.__setattr__(self, "floor", int(_bytes(self.floor, "floor")))
        object.__setattr__(self, "fixed_seconds", float(_seconds(self.fixed_seconds, "fixed_seconds")))
        self._check_shapes()
        self._spread_seconds()
        most = self.base + self.floor + sum(int(costs.max()) for costs in (*self.held, *self.transient))
        if most >= 2**_MOST_BITS:
            raise ValueError(f"all bytes (={most} together, at most) must be below 2**{_MOST_BITS}, to be exact.")

    def _spread_seconds(self) -> None:
        """Give each time that does not depend on the next unit for each choice of it."""
        spread = [
            costs[:, None].repeat(held.shape[1], axis=1) if costs.ndim == 1 else costs
            for costs, held in zip(self.seconds, self.held, strict=True)
        ]
        object.__setattr__(self, "seconds", spread)

    def _check_shapes(self) -> None:
        for index, unit in enumerate(self.transient):
            if unit.ndim != 1 or not unit.size:
                raise ValueError(f"`transient[{index}]` (of shape {unit.shape}) must be a list of one choice or more.")
        num_choices = [*map(len, self.transient), 1]
        for name, arrays, shapes in (
            ("held", self.held, pairwise(num_choices)),
            ("seconds", self.seconds, pairwise(num_choices)),
        ):
            for index, (costs, pair) in enumerate(zip(arrays, shapes, strict=False)):
                shape = pair[:1] if name == "seconds" and costs.ndim == 1 else pair
                if costs.shape != shape:
                    raise ValueError(
                        f"`{name}[{index}]` (of shape {costs.shape}) must be of shape {shape}, by the choices in "
                        "`transient`."
                    )

    @property
    def num_units(self) -> int:
        """Number of units in the chain."""
        return len(self.held)

    def peak(self, choices: Sequence[int]) -> int:
        """Return the peak bytes of a step with these choices, one for each unit."""
        self._check(choices)
        before, peak = self.base, max(self.base, self.floor)
        for index, (choice, after) in enumerate(pairwise([*choices, 0])):
            peak = max(peak, before + int(self.transient[index][choice]))
            before += int(self.held[index][choice, after])
        return peak

    def time(self, choices: Sequence[int]) -> float:
        """Return the seconds of a step with these choices, one for each unit."""
        self._check(choices)
        return math.fsum(
            [
                self.fixed_seconds,
                *(
                    float(costs[choice, after])
                    for costs, (choice, after) in zip(self.seconds, pairwise([*choices, 0]), strict=True)
                ),
            ]
        )

    def _check(self, choices: Sequence[int]) -> None:
        if len(choices) != self.num_units:
            raise ValueError(f"`choices` (of length {len(choices)}) must be one for each of {self.num_units} units.")
        for index, choice in enumerate(choices):
            if not 0 <= choice < len(self.transient[index]):
                most = len(self.transient[index]) - 1
                raise ValueError(f"`choices[{index}]` (={choice}) must be from 0 to {most}, the choices of that unit.")


@dataclass(frozen=True)
class FrontierPoint:
    """Assignment of choices that no other one beats in both memory and time."""

    peak_bytes: int
    seconds: float
    choices: tuple[int, ...]


@dataclass(frozen=True)
class Frontier:
    """Best assignments, by ascending peak and strictly descending time."""

    points: tuple[FrontierPoint, ...]
    is_exact: bool
    """Whether `points` are complete. If not, each point still has its true peak and time."""


class _States(NamedTuple):
    """Undominated pairs of peak and time, from a unit to the end of the chain, for each choice of the unit.

    They are grouped by choice, in order. Within a choice, peaks ascend and times descend.
    """

    peaks: _Ints
    """Peak, relative to the bytes alive before the unit."""
    ticks: _Ints
    choices: _Ints
    nexts: _Ints
    """Index of the state of the next unit that follows."""


def find_frontier(costs: ChainCosts, *, max_points: int = 1000) -> Frontier:
    """Find all assignments that no other one beats in both peak and time.

    This is a dynamic program from the last unit to the first. With P the peak from a unit on, relative to the bytes
    alive before it, and P' the same for the next unit,

        P = max(transient[p], held[p, q] + P')

    Neither P nor the time can fall when the rest of the chain gets worse. So a state that another one beats in both can
    be dropped without loss. If more than `max_points` states remain, the fastest state within each of `max_points`
    budgets is kept, where the budgets are evenly spaced from the least peak to the greatest. Kept states are not
    rounded. For each point of the exact frontier, there is then a point that is as fast and whose peak is higher by at
    most the sum, over the units, of the distances between budgets.

    Ties in peak and time keep the lower choice.

    Args:
        costs: Costs of each choice of each unit.
        max_points: Most states to keep for each choice of a unit, and most points to return; 2 or more.
    """
    if max_points < 2:
        raise ValueError(f"`max_points` (={max_points}) must be 2 or more, for the least peak and the least time.")
    ticks = _ticks(costs.seconds)
    # Nothing runs after the last unit, so the bytes that it holds make no peak.
    states = _States(*(np.array([value]) for value in (-(2**_MOST_BITS), 0, 0, 0)))
    is_exact = True
    chain = []
    for index in reversed(range(costs.num_units)):
        states, is_whole = _extend(
            states, costs.held[index], costs.transient[index], ticks[index], max_points=max_points
        )
        is_exact = is_exact and is_whole
        # Enough to follow the states later. Kept in 32 bits, since there are units times points of them.
        chain.append((states.choices.astype(np.int32), states.nexts.astype(np.int32)))
    # A unit before the first one, with one choice: it holds nothing and has the peak that no choice lowers.
    num_first = int(states.choices[-1]) + 1
    floor = np.array([max(0, costs.floor - costs.base)])
    start, is_whole = _extend(
        states, np.zeros((1, num_first), np.int64), floor, np.zeros((1, num_first), np.int64), max_points=max_points
    )
    points = _points(costs, start, chain[::-1])
    return Frontier(points, is_exact=is_exact and is_whole)


def _extend(states: _States, held: _Ints, transient: _Ints, ticks: _Ints, *, max_points: int) -> tuple[_States, bool]:
    """Return the states of a unit from the states of the next one, and whether they are complete."""
    kept = []
    is_whole = True
    for choice in range(len(held)):
        peaks = np.maximum(held[choice].take(states.choices) + states.peaks, transient[choice])
        times = states.ticks + ticks[choice].take(states.choices)
        best = _best(peaks, times)
        if len(best) > max_points:
            is_whole = False
            best = best[_evenly_spaced(peaks.take(best), max_points)]
        kept.append(_States(peaks.take(best), times.take(best), np.full(len(best), choice), best))
    return _States(*(np.concatenate(parts) for parts in zip(*kept, strict=True))), is_whole


def _best(peaks: _Ints, times: _Ints) -> _Ints:
    """Return the indices of undominated pairs by ascending peak; of equal pairs, the first."""
    # A stable sort keeps the first of equal pairs first. It is also fast, since states are a few ascending runs.
    order = peaks.argsort(kind="stable")
    peaks, times = peaks.take(order), times.take(order)
    is_best = np.ones(len(order), bool)
    np.less(times[1:], np.minimum.accumulate(times)[:-1], out=is_best[1:])
    best = np.flatnonzero(is_best)
    # Pairs with the same peak may remain, each faster than the one before; only the last is undominated.
    peaks = peaks.take(best)
    return order.take(best[np.append(peaks[1:] != peaks[:-1], True)])


def _evenly_spaced(peaks: _Ints, num_budgets: int) -> _Ints:
    """Return the indices of the fastest states within evenly spaced budgets; peaks ascend and times descend."""
    budgets = np.linspace(peaks[0], peaks[-1], num_budgets)
    fastest = np.searchsorted(peaks, budgets, side="right") - 1
    return fastest[np.append(fastest[1:] != fastest[:-1], True)]


def _points(
    costs: ChainCosts, start: _States, chain: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]
) -> tuple[FrontierPoint, ...]:
    """Follow each state before the first unit to the end of the chain, and return its choices."""
    choices = np.empty((len(start.peaks), costs.num_units), np.int32)
    seconds = np.empty(choices.shape)
    at: npt.NDArray[np.integer[Any]] = start.nexts
    for index, (unit_choices, nexts) in enumerate(chain):
        choices[:, index] = unit_choices[at]
        at = nexts[at]
    for index, own in enumerate(costs.seconds):
        following = choices[:, index + 1] if index + 1 < costs.num_units else 0
        seconds[:, index] = own[choices[:, index], following]
    points: list[FrontierPoint] = []
    for peak, row, terms in zip(start.peaks.tolist(), choices.tolist(), seconds.tolist(), strict=True):
        time = math.fsum([costs.fixed_seconds, *terms])
        if not points or time < points[-1].seconds:  # two numbers of ticks may be the same in seconds
            points.append(FrontierPoint(costs.base + peak, time, tuple(row)))
    return tuple(points)


def _ticks(seconds: Sequence[npt.NDArray[np.float64]]) -> list[_Ints]:
    """Convert times to integers, whose sum does not depend on the order, so that equal units tie exactly.

    A tick is a power of two, so that times with few digits are not rounded.
    """
    _, exponent = math.frexp(sum(float(costs.max()) for costs in seconds))
    return [np.rint(np.ldexp(costs, _TICK_BITS - exponent)).astype(np.int64) for costs in seconds]


def _bytes(value: npt.ArrayLike, name: str) -> _Ints:
    array = np.asarray(value)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"`{name}` (of type {array.dtype}) must be bytes, as integers.")
    if (array < 0).any():
        raise ValueError(f"`{name}` (={array.min()}) must not be negative.")
    if (array >= 2**_MOST_BITS).any():
        raise ValueError(f"`{name}` (={array.max()}) must be below 2**{_MOST_BITS} bytes.")
    return array.astype(np.int64)


def _seconds(value: npt.ArrayLike, name: str) -> npt.NDArray[np.float64]:
    array = np.asarray(value, np.float64)
    if not ((array >= 0) & (array < _MOST_SECONDS)).all():
        raise ValueError(f"`{name}` (={array.tolist()}) must be seconds: finite, not negative, below {_MOST_SECONDS}.")
    return array


def undominated(points: Iterable[FrontierPoint]) -> list[FrontierPoint]:
    """Return the points that no other one beats in both memory and time, from the least memory to the least time."""
    best: list[FrontierPoint] = []
    for point in sorted(points, key=lambda point: (point.peak_bytes, point.seconds)):
        if not best or point.seconds < best[-1].seconds:
            best.append(point)
    return best
