"""Read CPU tensors without PyTorch operators. The layout of a tensor is computed once, and cached."""

import ctypes
import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from revnet._torch_internals import in_functorch_transform

SIZE = 32
"""Number of elements of a digest."""

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
"""Dtypes whose values NumPy can read. For others (bfloat16, the 8-bit floats), only the bits are read."""
INTEGERS = {1: np.uint8, 2: np.int16, 4: np.int32}
C_TYPES: dict[torch.dtype, Any] = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
"""Dtypes of most streams, which ctypes reads faster than NumPy."""


class Layout(NamedTuple):
    """Description from which NumPy can read a tensor at an address."""

    read: Any
    """Function that returns the memory at an address."""
    shape: tuple[int, ...]
    dtype: Any
    strides: tuple[int, ...]
    """Strides in bytes."""


@lru_cache(maxsize=256)
def layout_of(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Layout:
    """Return the layout of tensors of this shape, stride and dtype. It is cached, because reading is faster."""
    itemsize = dtype.itemsize
    strides = tuple([step * itemsize for step in stride])
    # Not the number of elements: strides may leave gaps, or visit an element many times, as `expand` does.
    span = sum([(count - 1) * step for count, step in zip(shape, strides, strict=True)]) + itemsize
    memory = (ctypes.c_char * (0 if 0 in shape else span)).from_address
    return Layout(memory, tuple(shape), DTYPES.get(dtype, INTEGERS.get(itemsize, np.int64)), strides)


@lru_cache(maxsize=256)
def reader_of(dtype: torch.dtype, numel: int) -> tuple[Any, slice]:
    """Return a function that reads a contiguous tensor at an address, or None if NumPy must; and the sample to take."""
    kind = C_TYPES.get(dtype)
    return (
        (None, slice(None))
        if kind is None or not numel  # The address of an empty tensor is 0.
        else ((kind * numel).from_address, slice(None, None, step_of(numel, SIZE)))
    )


def digest_of_array(array: Any) -> list[float]:
    """Return a sample of an array's elements, spread over all dimensions."""
    if array.size == 0:
        return []
    sample = array[places(array.shape, SIZE)]
    # `math.dist` and `math.hypot`, which compare digests, accept only real numbers.
    if sample.dtype.kind == "c":
        sample = np.ascontiguousarray(sample).view(sample.real.dtype)
    return list(np.atleast_1d(sample).tolist())


@lru_cache(maxsize=256)
def step_of(numel: int, size: int, *, at_least: bool = False) -> int:
    """Return the step of a sample of about `size` elements, and of no fewer if `at_least` is true."""
    if not at_least:
        # An odd step visits all channels and tokens in turn, because most dimensions are even.
        return 1 if numel <= size else (numel // size) | 1
    # A step that shares no factor with any dimension visits all of them equally often.
    return next(step for step in range(max(1, numel // size), 0, -1) if math.gcd(step, numel) == 1)


@lru_cache(maxsize=256)
def places(shape: tuple[int, ...], size: int, *, at_least: bool = False) -> tuple[Any, ...]:
    """Return the indices of the same elements in an array of another layout."""
    numel = math.prod(shape)
    every = step_of(numel, size, at_least=at_least)
    return np.unravel_index(np.arange(0, numel, every), shape) if numel and shape else ()


LEAST = 16
"""Minimum number of sampled elements for a part to be compared."""


@lru_cache(maxsize=64)
def groups(shape: tuple[int, ...], size: int) -> tuple[tuple[Any, int], ...]:
    """Return, for each dimension that is compared, the part of each sampled element and the number of parts.

    The sample has at least `size` elements.
    """
    of_dim = places(shape, size, at_least=True)
    return tuple([(of_dim[dim], shape[dim]) for dim in judged_dims(shape, len(of_dim[0]), LEAST)]) if of_dim else ()


def judged_dims(shape: tuple[int, ...], num_sampled: int, least: int) -> list[int]:
    """Return the dimensions along which a stream has parts to compare: samples of the batch, channels, tokens.

    Args:
        shape: The shape of the stream.
        num_sampled: The number of sampled elements.
        least: The minimum number of sampled elements for a part to be compared; a part of a few elements may be small
            by chance.
    """
    # For an image or a volume, only samples and channels: no function normalizes a row of pixels.
    dims = range(len(shape) if len(shape) <= 3 else 2)
    return [dim for dim in dims if shape[dim] > 1 and num_sampled >= least * shape[dim]]


def is_on_host(x: torch.Tensor) -> bool:
    """Return whether NumPy can read the tensor's bits."""
    is_strided = type(x) is torch.Tensor and x.device.type == "cpu" and x.layout is torch.strided
    return is_strided and not in_functorch_transform()


def same_bits(a: Any, b: Any) -> bool:
    """Return whether two arrays of one shape and dtype hold the same bits."""
    # Compares bits: NaN equals itself, and -0.0 differs from 0.0.
    a, b = (np.ascontiguousarray(array).reshape(-1) for array in (a, b))
    return bool(np.array_equal(a.view(np.uint8), b.view(np.uint8)))


def sum_of_bits(array: Any) -> int:
    """Return the sum of the elements' bits, as integers."""
    if array.ndim == 0 or array.strides[-1] != array.itemsize:
        array = np.ascontiguousarray(array).reshape(-1)  # `view` needs a dense last dimension.
    # As long integers if possible, which takes a quarter of the time. Sums of integers wrap around silently.
    is_even = array.shape[-1] * array.itemsize % 8 == 0
    return int(array.view(np.int64 if is_even else INTEGERS[array.itemsize]).sum(dtype=np.int64))


def array_of(x: torch.Tensor) -> Any:
    """Return a tensor's memory as an array. The array must not outlive the tensor.

    `Tensor.numpy` is not used, because it marks the storage as not resizable, and FSDP must resize it.
    """
    read, shape, dtype, strides = layout_of(x.shape, x.stride(), x.dtype)
    return np.ndarray(shape, dtype, read(x.data_ptr()), 0, strides)
