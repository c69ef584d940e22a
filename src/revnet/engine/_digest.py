"""Samples of tensors as plain numbers on the host: what a run remembers of a stream at no cost in tensor memory.

They are read through NumPy from the memory of a tensor of the CPU, so that nothing is allocated, no operator of PyTorch
runs, and a measured step has the operations of a predicted one.
"""

import ctypes
import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from revnet._torch_internals import in_functorch_transform

SIZE = 32
"""Elements of a digest."""

Digest = list[float]

_TINY = 1e-300
_DTYPES = {
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
_READABLE = (Tensor, nn.Parameter)
_C_TYPES: dict[torch.dtype, Any] = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
"""The dtypes of most streams, which the standard library reads faster than NumPy."""
_INTEGERS = {1: np.uint8, 2: np.int16, 4: np.int32}


def can_digest(x: Tensor) -> bool:
    """Return whether a tensor has values that can be read without waiting for a device, and that NumPy knows."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and x.dtype in _DTYPES
        and not in_functorch_transform()
    )


def has_memory(x: Tensor) -> bool:
    """Return whether a tensor's memory is there: FSDP takes away that of a parameter after its function."""
    return x.untyped_storage().nbytes() >= x.nbytes and x.data_ptr() != 0


def _array(x: Tensor) -> Any:
    """Return a tensor's memory as an array, which must not outlive it.

    `Tensor.numpy` would do, but it marks the storage as one that cannot be resized, as FSDP must.
    """
    itemsize = x.element_size()
    strides = tuple([stride * itemsize for stride in x.stride()])
    shape = tuple(x.shape)
    if 0 in shape:
        return np.empty(shape, _DTYPES.get(x.dtype, _INTEGERS.get(itemsize, np.int64)))
    span = sum([(count - 1) * stride for count, stride in zip(shape, strides, strict=True)]) + itemsize
    memory: Any = _bytes_reader(span)(x.data_ptr())
    return np.ndarray(shape, _DTYPES.get(x.dtype, _INTEGERS.get(itemsize, np.int64)), memory, 0, strides)


@lru_cache(maxsize=256)
def _bytes_reader(span: int) -> Any:
    """Return what reads so many bytes at an address; kept, since making its type takes longer than reading."""
    return (ctypes.c_char * span).from_address


def digest_of(x: Tensor) -> Digest:
    """Return a sample of the elements of a tensor of which `can_digest` is true, spread over all dimensions."""
    kind = _C_TYPES.get(x.dtype)
    if kind is None or not x.is_contiguous() or x.numel() == 0:
        return _digest_of_any(x)
    read, step = _reader(kind, x.numel())
    digest: Digest = read(x.data_ptr())[::step]
    return digest


def reader_of(x: Tensor) -> tuple[Any, slice]:
    """Return what reads a contiguous tensor like `x` at an address, and the sample to take of it; None if nothing."""
    kind = _C_TYPES.get(x.dtype)
    if kind is None or x.numel() == 0:
        return None, slice(None)
    read, step = _reader(kind, x.numel())
    return read, slice(None, None, step)


@lru_cache(maxsize=256)
def _reader(kind: Any, numel: int) -> tuple[Any, int]:
    """Return what reads so many elements at an address, and the step of a sample of them."""
    return (kind * numel).from_address, _step(numel, SIZE)


def _digest_of_any(x: Tensor) -> Digest:
    array = _array(x)
    if array.size == 0:
        return []
    sample = array[_places(array.shape, SIZE)]
    if sample.dtype.kind == "c":
        sample = np.ascontiguousarray(sample).view(sample.real.dtype)
    return list(np.atleast_1d(sample).tolist())


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

    values: Any
    """An array of float64."""
    groups: tuple[tuple[Any, int], ...]
    """For each dimension that is judged, the part to which each element belongs, and the number of parts."""


def parts_of(x: Tensor) -> Parts:
    """Return a sample in which each channel, token and sample of the batch has several elements."""
    array = _array(x)
    if array.size == 0 or array.ndim == 0 or array.dtype.kind == "c":
        return Parts(np.array(digest_of(x)), ())
    size = max(512, _LEAST * max(array.shape))
    return Parts(array[_places(array.shape, size)].astype(np.float64), _groups(array.shape, size))


_LEAST = 16
"""Elements of a part below which it is not judged: a part of a few is small by chance."""


@lru_cache(maxsize=64)
def _groups(shape: tuple[int, ...], size: int) -> tuple[tuple[Any, int], ...]:
    places = _places(shape, size)
    return tuple(
        (places[dim], count)
        for dim, count in enumerate(shape)
        # Of an image or a volume, samples and channels: no function normalizes a row of pixels.
        if (dim < 2 or len(shape) <= 3) and count > 1 and len(places[dim]) >= _LEAST * count
    )


def relative_errors(found: Any, true: Parts, floor: float) -> tuple[float, float]:
    """Return the relative error of a sample as a whole, and the largest of any of its parts.

    A part that was zero throughout does not count: any rounding of the other stream would be infinitely much of it.

    Args:
        found: The elements as they are now.
        true: The elements as they were.
        floor: How large an element of the whole counts at least.
    """
    differences, squares = np.square(found - true.values), np.square(true.values)
    size = max(math.sqrt(squares.sum()), floor * math.sqrt(len(squares)), _TINY)
    whole, worst = math.sqrt(differences.sum()) / size, 0.0
    for part, count in true.groups:
        of_part = np.bincount(part, squares, count)
        is_there = of_part > 0
        if is_there.any():
            shares = np.bincount(part, differences, count)[is_there] / of_part[is_there]
            worst = max(worst, math.sqrt(shares.max()))
    return whole, worst


def checksum(x: Tensor) -> int | None:
    """Return a number for the bits of a tensor: their sum as integers modulo 2^64; None where they cannot be read.

    Unlike a sum of the values, it sees a change of any one element.
    """
    if type(x) not in _READABLE or x.device.type != "cpu" or x.layout is not torch.strided or x.numel() == 0:
        return None
    if in_functorch_transform() or not has_memory(x):
        return None
    if x.is_contiguous():
        array = np.frombuffer(_bytes_reader(x.nbytes)(x.data_ptr()), np.uint8)
    else:
        array = _array(x)
        if array.strides[-1] != array.itemsize:
            array = np.ascontiguousarray(array)
    # As long integers where that is possible, which takes a quarter of the time. A sum of integers wraps in silence.
    is_even = array.shape[-1] * array.itemsize % 8 == 0
    return int(array.view(np.int64 if is_even else _INTEGERS[array.itemsize]).sum(dtype=np.int64))


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors of one shape and dtype, of which `can_digest` is true, hold the same bits."""
    a, b = (np.ascontiguousarray(_array(each)).reshape(-1) for each in (x, y))
    return bool(np.array_equal(a.view(np.uint8), b.view(np.uint8)))
