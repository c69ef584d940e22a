"""Samples of tensors as plain numbers on the host: what a run remembers of a stream at no cost in tensor memory."""

import math
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revnet._torch_internals import in_functorch_transform

SIZE = 32
"""Elements of a digest."""

Digest = list[float]

_TINY = 1e-300


def can_digest(x: Tensor) -> bool:
    """Return whether a tensor has values that can be read without waiting for a device."""
    return type(x) is Tensor and x.device.type == "cpu" and x.layout is torch.strided and not in_functorch_transform()


def digest_of(x: Tensor) -> Digest:
    """Return a sample of the elements of a tensor of which `can_digest` is true, spread over all dimensions."""
    if not x.is_contiguous() or x.is_complex():
        return _digest_of_any(x)
    values: Digest = x.data.as_strided(*_lattice(x.numel(), SIZE), x.storage_offset()).tolist()
    return values


@lru_cache(maxsize=256)
def _lattice(numel: int, most: int) -> tuple[tuple[int], tuple[int]]:
    """Return the size and the step of a sample of so many elements."""
    # An odd step meets every residue of the dimensions, which are mostly even: all channels, all tokens in turn.
    step = 1 if numel <= most else (numel // most) | 1
    return ((numel - 1) // step + 1 if numel else 0,), (step,)


class Parts(NamedTuple):
    """A sample of a stream, and which of its elements belong to one channel, one token, one sample of the batch."""

    values: Digest
    groups: tuple[tuple[int, ...], ...]
    """The places of the elements of each part; empty where the layout does not tell."""


def parts_of(x: Tensor) -> Parts:
    """Return a sample in which each channel, token and sample of the batch has several elements."""
    numel, size = x.numel(), max(512, 4 * max(x.shape, default=1))
    if not x.is_contiguous() or x.is_complex():
        return Parts(_digest_of_any(x), ())
    (size,), (step,) = _lattice(numel, size)
    values: Digest = x.data.as_strided((size,), (step,), x.storage_offset()).tolist()
    return Parts(values, _groups(x.shape, step, size))


@lru_cache(maxsize=64)
def _groups(shape: tuple[int, ...], step: int, size: int) -> tuple[tuple[int, ...], ...]:
    groups: list[tuple[int, ...]] = []
    inner = 1
    for count in reversed(shape):
        if count > 1:
            members: list[list[int]] = [[] for _ in range(count)]
            for place in range(size):
                members[place * step // inner % count].append(place)
            # Parts of one or two elements say little: a small one of these is small by chance.
            groups += [tuple(each) for each in members if len(each) >= 4]
        inner *= count
    return tuple(groups)


def part_error(found: Digest, true: Parts, floor: float) -> float:
    """Return the largest relative error of any part of a sample, and of the whole.

    A part that was zero throughout does not count: any rounding of the other stream would be infinitely much of it.

    Args:
        found: The elements as they are now.
        true: The elements as they were.
        floor: How large an element of the whole counts at least.
    """
    values = true.values
    distance = math.dist(found, values)
    worst = distance / max(math.hypot(*values), floor * len(values) ** 0.5, _TINY)
    for group in true.groups:
        before = [values[place] for place in group]
        size = math.hypot(*before)
        if size and distance > worst * size:  # Otherwise no part of the whole distance can be that much.
            worst = max(worst, math.dist([found[place] for place in group], before) / size)
    return worst


def _digest_of_any(x: Tensor) -> Digest:
    x = x.data
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    flat: Digest = x[_grid(x.shape, SIZE)].reshape(-1).tolist()
    return flat


@lru_cache(maxsize=256)
def _grid(shape: tuple[int, ...], most: int) -> tuple[slice, ...]:
    """Return steps along each dimension that leave about `most` elements; the largest dimension is thinned first."""
    counts = list(shape)
    while counts and _product(counts) > most:
        largest = max(range(len(counts)), key=counts.__getitem__)
        counts[largest] = -(-counts[largest] // 2)
    return tuple([slice(None, None, max(1, size // max(1, count))) for size, count in zip(shape, counts, strict=True)])


def _product(counts: list[int]) -> int:
    product = 1
    for count in counts:
        product *= count
    return product


def checksum(x: Tensor) -> int | None:
    """Return a number for the bits of a tensor: their sum as integers modulo 2^64; None where they cannot be read.

    Unlike a sum of the values, it sees a change of any one element.
    """
    if not can_digest(x) or x.numel() == 0:
        return None
    x = x.data
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    if x.dim() == 0 or x.stride(-1) != 1:
        x = x.contiguous().view(-1)
    # As long integers where that is possible: a sum of shorter ones makes a copy of them all.
    itemsize = x.element_size()
    strides = [*x.stride()[:-1], x.storage_offset(), x.shape[-1]]
    is_aligned = itemsize >= 8 or not any(each * itemsize % 8 for each in strides)
    short = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(itemsize, torch.int64)
    total: Any = x.view(torch.int64 if is_aligned else short).sum().tolist()
    return int(total)


def flatten(nested: Any, dims: int) -> list[float]:
    """Return the numbers of a nested list of `dims` levels."""
    for _ in range(dims - 1):
        nested = list(chain.from_iterable(nested))
    flat: list[float] = nested if dims else [nested]
    return flat
