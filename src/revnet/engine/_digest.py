"""Samples of tensors as plain numbers on the host: what a run remembers of a stream at no cost in tensor memory.

They are read through NumPy, which shares the memory of a tensor of the CPU, so that nothing is allocated and a measured
step has the allocations of a predicted one.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from revnet._torch_internals import in_functorch_transform

SIZE = 32
"""Elements of a digest."""

Digest = list[float]

_TINY = 1e-300
_INTEGERS = {1: np.uint8, 2: np.int16, 4: np.int32}


def can_digest(x: Tensor) -> bool:
    """Return whether a tensor has values that can be read without waiting for a device, and that NumPy knows."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and x.dtype is not torch.bfloat16
        and not in_functorch_transform()
    )


def digest_of(x: Tensor) -> Digest:
    """Return a sample of the elements of a tensor of which `can_digest` is true, spread over all dimensions."""
    array = x.data.numpy()
    if array.flags.c_contiguous:
        sample = array.reshape(-1)[:: _step(array.size, SIZE)]
    else:
        sample = array[_places(array.shape, SIZE)]
    if sample.dtype.kind == "c":
        sample = np.ascontiguousarray(sample).view(sample.real.dtype)
    digest: Digest = sample.tolist()
    return digest


def _step(numel: int, most: int) -> int:
    """Return the step of a sample of about `most` elements."""
    # An odd step meets every residue of the dimensions, which are mostly even: all channels, all tokens in turn.
    return 1 if numel <= most else (numel // most) | 1


@lru_cache(maxsize=256)
def _places(shape: tuple[int, ...], most: int) -> tuple[Any, ...]:
    """Return the places of the same elements in an array of another layout."""
    numel = math.prod(shape)
    return np.unravel_index(np.arange(0, numel, _step(numel, most)), shape) if numel and shape else ()


class Parts(NamedTuple):
    """A sample of a stream, and which of its elements belong to one channel, one token, one sample of the batch."""

    values: Digest
    groups: tuple[tuple[int, ...], ...]
    """The places of the elements of each part."""


def parts_of(x: Tensor) -> Parts:
    """Return a sample in which each channel, token and sample of the batch has several elements."""
    array = x.data.numpy()
    size = max(512, 4 * max(array.shape, default=1))
    sample = array[_places(array.shape, size)] if array.ndim and array.size else array.reshape(-1)
    groups = _groups(array.shape, size)
    if sample.dtype.kind == "c":
        sample, groups = np.ascontiguousarray(sample).view(sample.real.dtype), ()
    return Parts(sample.tolist(), groups)


@lru_cache(maxsize=64)
def _groups(shape: tuple[int, ...], size: int) -> tuple[tuple[int, ...], ...]:
    numel = math.prod(shape)
    step = _step(numel, size)
    groups: list[tuple[int, ...]] = []
    inner = 1
    for dim, count in reversed(list(enumerate(shape))):
        # Of an image or a volume, samples and channels: no function normalizes a row of pixels.
        if count > 1 and (dim < 2 or len(shape) <= 3):
            members: list[list[int]] = [[] for _ in range(count)]
            for place in range(len(range(0, numel, step))):
                members[place * step // inner % count].append(place)
            # Parts of one or two elements say little: a small one of these is small by chance.
            groups += [tuple(each) for each in members if len(each) >= 4]
        inner *= count
    return tuple(groups)


def relative_errors(found: Digest, true: Parts, floor: float) -> tuple[float, float]:
    """Return the relative error of a sample as a whole, and the largest of any of its parts.

    A part that was zero throughout does not count: any rounding of the other stream would be infinitely much of it.

    Args:
        found: The elements as they are now.
        true: The elements as they were.
        floor: How large an element of the whole counts at least.
    """
    values = true.values
    distance, worst = math.dist(found, values), 0.0
    for group in true.groups:
        before = [values[place] for place in group]
        size = math.hypot(*before)
        if size and distance > worst * size:  # Otherwise no part of the whole distance can be that much.
            worst = max(worst, math.dist([found[place] for place in group], before) / size)
    return distance / max(math.hypot(*values), floor * len(values) ** 0.5, _TINY), worst


def checksum(x: Tensor) -> int | None:
    """Return a number for the bits of a tensor: their sum as integers modulo 2^64; None where they cannot be read.

    Unlike a sum of the values, it sees a change of any one element.
    """
    if not can_digest(x) or x.numel() == 0:
        return None
    array = x.data.numpy()
    if array.ndim == 0 or array.strides[-1] != array.itemsize:
        array = np.ascontiguousarray(array).reshape(-1)
    # As long integers where that is possible, which takes a quarter of the time.
    is_even = array.itemsize >= 8 or array.shape[-1] * array.itemsize % 8 == 0
    integers = array.view(np.int64 if is_even else _INTEGERS[array.itemsize])
    with np.errstate(over="ignore"):
        return int(integers.sum(dtype=np.int64))


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors of one shape and dtype, of which `can_digest` is true, hold the same bits."""
    a, b = (np.ascontiguousarray(each.data.numpy()).reshape(-1) for each in (x, y))
    return bool(np.array_equal(a.view(np.uint8), b.view(np.uint8)))
