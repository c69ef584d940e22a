"""How tensors of the CPU are read without an operator of PyTorch: found once for each shape, and kept."""

import ctypes
import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

SIZE = 32
"""Elements of a digest."""

DTYPES = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.complex128: np.complex128,
    torch.complex64: np.complex64,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}
"""The dtypes of which NumPy knows the values. Of others (bfloat16, the 8-bit floats) only the bits are read."""
INTEGERS = {1: np.uint8, 2: np.int16, 4: np.int32}
C_TYPES: dict[torch.dtype, Any] = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
"""The dtypes of most streams, which the standard library reads faster than NumPy."""


class Layout(NamedTuple):
    """How NumPy reads a tensor at an address."""

    read: Any
    """Returns the memory at an address."""
    shape: tuple[int, ...]
    dtype: Any
    strides: tuple[int, ...]
    """In bytes."""


@lru_cache(maxsize=256)
def layout_of(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Layout:
    """Return how to read tensors of this shape, stride and dtype; kept, since this takes longer than reading."""
    itemsize = dtype.itemsize
    strides = tuple([step * itemsize for step in stride])
    # Not the number of elements: strides may leave gaps, or meet an element many times, as `expand` does.
    span = sum([(count - 1) * step for count, step in zip(shape, strides, strict=True)]) + itemsize
    memory = (ctypes.c_char * (0 if 0 in shape else span)).from_address
    return Layout(memory, tuple(shape), DTYPES.get(dtype, INTEGERS.get(itemsize, np.int64)), strides)


@lru_cache(maxsize=256)
def reader_of(dtype: torch.dtype, numel: int) -> tuple[Any, slice]:
    """Return what reads a contiguous tensor at an address, and the sample to take of it; None where NumPy must."""
    kind = C_TYPES.get(dtype)
    return (
        (None, slice(None))
        if kind is None or not numel  # The address of an empty tensor is 0.
        else ((kind * numel).from_address, slice(None, None, step_of(numel, SIZE)))
    )


def digest_of_array(array: Any) -> list[float]:
    """Return a sample of the elements of an array, spread over all dimensions."""
    if array.size == 0:
        return []
    sample = array[places(array.shape, SIZE)]
    # `math.dist` and `math.hypot`, by which digests are compared, know real numbers only.
    if sample.dtype.kind == "c":
        sample = np.ascontiguousarray(sample).view(sample.real.dtype)
    return list(np.atleast_1d(sample).tolist())


@lru_cache(maxsize=256)
def step_of(numel: int, most: int) -> int:
    """Return the step of a sample of about `most` elements."""
    # An odd step meets every residue of the dimensions, which are mostly even: all channels, all tokens in turn.
    return 1 if numel <= most else (numel // most) | 1


@lru_cache(maxsize=256)
def places(shape: tuple[int, ...], most: int) -> tuple[Any, ...]:
    """Return the places of the same elements in an array of another layout."""
    numel = math.prod(shape)
    return np.unravel_index(np.arange(0, numel, step_of(numel, most)), shape) if numel and shape else ()


LEAST = 16
"""Elements of a part below which it is not judged."""


@lru_cache(maxsize=64)
def groups(shape: tuple[int, ...], size: int) -> tuple[tuple[Any, int], ...]:
    """Return the part of each sampled element and the number of parts, for each dimension that is judged."""
    of_dim = places(shape, size)
    return tuple([(of_dim[dim], shape[dim]) for dim in judged_dims(shape, len(of_dim[0]), LEAST)]) if of_dim else ()


def judged_dims(shape: tuple[int, ...], num_sampled: int, least: int) -> list[int]:
    """Return the dimensions along which a stream has parts to judge: samples of the batch, channels, tokens.

    Args:
        shape: Of the stream.
        num_sampled: Number of elements of a sample of it.
        least: Elements of the sample below which a part is not judged: a part of a few is small by chance.
    """
    # Of an image or a volume, samples and channels: no function normalizes a row of pixels.
    dims = range(len(shape) if len(shape) <= 3 else 2)
    return [dim for dim in dims if shape[dim] > 1 and num_sampled >= least * shape[dim]]


def same_bits(a: Any, b: Any) -> bool:
    """Return whether two arrays of one shape and dtype hold the same bits."""
    # Bits rather than values: NaN equals itself, and -0.0 is not 0.0.
    a, b = (np.ascontiguousarray(each).reshape(-1) for each in (a, b))
    return bool(np.array_equal(a.view(np.uint8), b.view(np.uint8)))
