"""Reading tensors of the CPU through NumPy, whatever their layout: what digests need besides the plain case."""

import ctypes
import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
"""The dtypes of which NumPy knows the values. Of others (bfloat16, the 8-bit floats) only the bits are read."""
INTEGERS = {1: np.uint8, 2: np.int16, 4: np.int32}


def array_of(x: Tensor) -> Any:
    """Return a tensor's memory as an array, which must not outlive it.

    `Tensor.numpy` would do, but it marks the storage as one that cannot be resized, as FSDP must.
    """
    itemsize = x.element_size()
    strides = tuple([stride * itemsize for stride in x.stride()])
    shape = tuple(x.shape)
    if 0 in shape:
        return np.empty(shape, DTYPES.get(x.dtype, INTEGERS.get(itemsize, np.int64)))
    span = sum([(count - 1) * stride for count, stride in zip(shape, strides, strict=True)]) + itemsize
    memory: Any = bytes_reader(span)(x.data_ptr())
    return np.ndarray(shape, DTYPES.get(x.dtype, INTEGERS.get(itemsize, np.int64)), memory, 0, strides)


@lru_cache(maxsize=256)
def bytes_reader(span: int) -> Any:
    """Return what reads so many bytes at an address; kept, since making its type takes longer than reading."""
    return (ctypes.c_char * span).from_address


def digest_of_any(x: Tensor) -> list[float]:
    """Return a digest of a tensor of any layout, of which `can_digest` is true."""
    array = array_of(x)
    if array.size == 0:
        return []
    sample = array[places(array.shape, SIZE)]
    if sample.dtype.kind == "c":
        sample = np.ascontiguousarray(sample).view(sample.real.dtype)
    return list(np.atleast_1d(sample).tolist())


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
"""Elements of a part below which it is not judged: a part of a few is small by chance."""


@lru_cache(maxsize=64)
def groups(shape: tuple[int, ...], size: int) -> tuple[tuple[Any, int], ...]:
    """Return the part of each sampled element and the number of parts, for each dimension that is judged."""
    of_dim = places(shape, size)
    return tuple(
        (of_dim[dim], count)
        for dim, count in enumerate(shape)
        # Of an image or a volume, samples and channels: no function normalizes a row of pixels.
        if (dim < 2 or len(shape) <= 3) and count > 1 and len(of_dim[dim]) >= LEAST * count
    )


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors of one shape and dtype, of which `can_digest` is true, hold the same bits."""
    a, b = (np.ascontiguousarray(array_of(each)).reshape(-1) for each in (x, y))
    return bool(np.array_equal(a.view(np.uint8), b.view(np.uint8)))
