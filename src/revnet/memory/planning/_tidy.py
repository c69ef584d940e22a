"""Give equal units equal choices in a row, where that costs next to nothing.

The search knows no difference between equal units, so it may scatter their choices. A plan with few runs of policies
is easier to read, and takes less time to predict.
"""

import math
from collections.abc import Hashable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from revnet.memory.planning._search import ChainCosts, FrontierPoint, undominated

_MOST_TIME = 1e-4
"""Largest part of the time that an order may add: where two runs meet, a unit may save less."""
_Ints = npt.NDArray[np.int64]


def tidied(costs: ChainCosts, points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """Return the points with the choices of equal units in order.

    A point stays as it is if its order would need more memory, or add more than 0.01 % to its time. Points that another
    one then beats are left out.

    Args:
        costs: The costs.
        points: Assignments of choices, by ascending peak and descending time.
    """
    if not points or not costs.num_units:
        return list(points)
    choices = np.array([point.choices for point in points], np.int64)
    peaks = np.array([point.peak_bytes for point in points])
    seconds = np.array([point.seconds for point in points])
    # Units that hold more come last: they hold it for a shorter time, so the peak is lower. Then the reverse is tried.
    is_open = np.ones(len(points), bool)
    for sign in (1, -1):
        ordered = _ordered(costs, choices, sign)
        ordered_peaks, ordered_seconds = _figures(costs, ordered)
        is_good = is_open & (ordered_peaks <= peaks) & (ordered_seconds <= seconds * (1 + _MOST_TIME))
        choices[is_good] = ordered[is_good]
        peaks, seconds = np.where(is_good, ordered_peaks, peaks), np.where(is_good, ordered_seconds, seconds)
        is_open &= ~is_good
    return undominated(map(FrontierPoint, peaks.tolist(), seconds.tolist(), map(tuple, choices.tolist())))


def _ordered(costs: ChainCosts, choices: _Ints, sign: int) -> _Ints:
    """Return the choices, sorted within each row of equal units by the bytes that they hold."""
    result = choices.copy()
    for start, stop in _rows(costs):
        held = costs.held[start]
        order = np.argsort(sign * held.max(1), kind="stable")
        ranks = np.argsort(order)
        result[:, start:stop] = order[np.sort(ranks[choices[:, start:stop]], axis=1)]
    return result


def _rows(costs: ChainCosts) -> list[tuple[int, int]]:
    """Return the first index of each row of equal units, and the index after its last one."""
    # The peaks of units fall along the chain, because the gradients of later units count.
    keys: list[Hashable] = [
        tuple(part.tobytes() for part in (held, transient - transient.min(), seconds))
        for held, transient, seconds in zip(costs.held, costs.transient, costs.seconds, strict=True)
    ]
    starts = [0, *[index for index in range(1, len(keys)) if keys[index] != keys[index - 1]], len(keys)]
    return [(start, stop) for start, stop in pairwise(starts) if stop - start > 1]


def _figures(costs: ChainCosts, choices: _Ints) -> tuple[_Ints, npt.NDArray[np.float64]]:
    """Return the peak and the seconds of each assignment."""
    following = np.append(choices[:, 1:], np.zeros((len(choices), 1), np.int64), axis=1)
    before = np.full(len(choices), costs.base)
    peaks = np.full(len(choices), max(costs.base, costs.floor))
    seconds: npt.NDArray[np.float64] = np.empty(choices.shape)
    for index in range(costs.num_units):
        own, after = choices[:, index], following[:, index]
        peaks = np.maximum(peaks, before + costs.transient[index][own])
        before = before + costs.held[index][own, after]
        seconds[:, index] = costs.seconds[index][own, after]
    sums = [math.fsum([costs.fixed_seconds, *row]) for row in list(seconds)]
    return peaks, np.array(sums)
