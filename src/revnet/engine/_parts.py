"""Errors of the parts of a stream that a function may normalize: a channel, a token, a sample of the batch."""

import math
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from revnet.engine._arrays import LEAST, groups, places, step_of
from revnet.engine._device_digest import sample_on_device
from revnet.engine._digest import array_of, digest_of

_TINY = 1e-300  # In place of the norm of zeros, by which nothing can be divided.


class Parts(NamedTuple):
    """A sample of a stream, and which of its elements belong to one channel, one token, one sample of the batch."""

    values: Any
    """An array of float64."""
    groups: tuple[tuple[Any, int], ...]
    """For each dimension that is judged, the part to which each element belongs, and the number of parts."""


def parts_of(x: Tensor) -> Parts:
    """Return a sample in which each channel, token and sample of the batch has several elements."""
    size = max(512, LEAST * max(x.shape, default=1))
    if x.device.type != "cpu":
        # A complex sample has two numbers for each element, which the places of elements do not fit.
        return Parts(np.array(sample_on_device(x, size)), () if x.is_complex() else groups(tuple(x.shape), size))
    array = array_of(x)
    if array.size == 0 or array.ndim == 0 or array.dtype.kind == "c":
        return Parts(np.array(digest_of(x)), ())
    # The same elements either way; to reshape what is not contiguous would copy all of it.
    flat = array.reshape(-1)[:: step_of(array.size, size)] if x.is_contiguous() else array[places(array.shape, size)]
    return Parts(flat.astype(np.float64), groups(array.shape, size))


def relative_errors(x: Tensor, true: Parts, floor: float) -> tuple[float, float]:
    """Return the relative error of a sample as a whole, and the largest of any of its parts.

    A part that was zero throughout does not count: any rounding of the other stream would be infinitely much of it.

    Args:
        x: The stream as it is now.
        true: The elements as they were.
        floor: How large an element of the whole counts at least.
    """
    differences, squares = np.square(parts_of(x).values - true.values), np.square(true.values)
    size = max(math.sqrt(squares.sum()), floor * math.sqrt(len(squares)), _TINY)
    worst = 0.0
    for part, count in true.groups:
        of_part = np.bincount(part, squares, count)
        of_part[of_part == 0] = math.inf
        worst = max(worst, (np.bincount(part, differences, count) / of_part).max())
    return math.sqrt(differences.sum()) / size, math.sqrt(worst)
