"""Errors of the parts of a stream that a function may normalize: a channel, a token, or a sample of the batch."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from revnet.engine._arrays import LEAST, array_of, groups, places, step_of
from revnet.engine._device_digest import sample_on_device
from revnet.engine._digest import digest_of

_TINY = 1e-300  # Replaces a norm of zero, to avoid a division by zero.


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Sample of a stream, and the channel, token and sample of the batch that each element belongs to."""

    values: Any
    """Sampled elements, as a float64 array."""
    groups: tuple[tuple[Any, int], ...]
    """For each dimension that is compared, the part of each element and the number of parts."""


def parts_of(x: Tensor) -> Parts:
    """Return a sample with several elements of each channel, token and sample of the batch."""
    size = max(512, LEAST * max(x.shape, default=1))
    if x.device.type != "cpu":
        # A complex sample has two numbers for each element, which the groups do not fit.
        sample = np.array(sample_on_device(x, size, at_least=True))
        return Parts(sample, () if x.is_complex() else groups(tuple(x.shape), size))
    array = array_of(x)
    if array.size == 0 or array.ndim == 0 or array.dtype.kind == "c":
        return Parts(np.array(digest_of(x)), ())
    # Both ways take the same elements; reshaping a non-contiguous array would copy all of it.
    if x.is_contiguous():
        sample = array.reshape(-1)[:: step_of(array.size, size, at_least=True)]
    else:
        sample = array[places(array.shape, size, at_least=True)]
    return Parts(sample.astype(np.float64), groups(array.shape, size))


def relative_errors(x: Tensor, true: Parts, floor: float) -> tuple[float, float]:
    """Return the relative error of a sample, and the largest relative error of its parts.

    A part that is zero throughout is skipped, because any rounding of the other stream would count as infinite.

    Args:
        x: The stream as it is now.
        true: The true elements.
        floor: Size of an element to use for a sample that is zero.
    """
    # NaN and inf are judged by the caller, whatever the user's settings are for NumPy's warnings.
    with np.errstate(all="ignore"):
        differences, squares = np.square(parts_of(x).values - true.values), np.square(true.values)
        size = math.sqrt(squares.sum()) or max(floor * math.sqrt(len(squares)), _TINY)
        worst = 0.0
        for part, count in true.groups:
            of_part = np.bincount(part, squares, count)
            of_part[of_part == 0] = math.inf
            worst = max(worst, (np.bincount(part, differences, count) / of_part).max())
        return math.sqrt(differences.sum()) / size, math.sqrt(worst)
