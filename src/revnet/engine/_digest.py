"""Samples of tensors as plain numbers on the host: what a run remembers of a stream at no cost in tensor memory.

They are read from memory, without an operator of PyTorch, so that a measured step is what a predicted one is.
"""

import math
from ctypes import string_at
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from revnet._torch_internals import in_functorch_transform
from revnet.engine._arrays import DTYPES, INTEGERS, digest_of_array, layout_of, reader_of
from revnet.engine._careful import not_the_same
from revnet.engine._device_digest import checksum_on_device, may_wait_for, sample_on_device

Digest = list[float]

NOISE = 1024.0
"""Units in the last place by which two runs of one function on one input may differ."""


def can_digest(x: Tensor) -> bool:
    """Return whether a tensor has values that can be read without waiting for a device, and that NumPy knows."""
    is_strided = type(x) is Tensor and x.device.type == "cpu" and x.layout is torch.strided
    return is_strided and x.dtype in DTYPES and not in_functorch_transform()


def has_memory(x: Tensor) -> bool:
    """Return whether a tensor's memory is there: FSDP takes away that of a parameter after its function."""
    return x.untyped_storage().nbytes() >= x.nbytes and x.data_ptr() != 0


def array_of(x: Tensor) -> Any:
    """Return a tensor's memory as an array, which must not outlive it.

    `Tensor.numpy` would do, but it marks the storage as one that cannot be resized, as FSDP must.
    """
    read, shape, dtype, strides = layout_of(x.shape, x.stride(), x.dtype)
    return np.ndarray(shape, dtype, read(x.data_ptr()), 0, strides)


def digest_of(x: Tensor) -> Digest:
    """Return a sample of the elements of a tensor of which `can_digest` is true, spread over all dimensions."""
    if x.device.type != "cpu":
        return sample_on_device(x)
    read, every = reader_of(x.dtype, x.numel())
    if read is None or not x.is_contiguous():
        return digest_of_array(array_of(x))
    digest: Digest = read(x.data_ptr())[every]
    return digest


def checksum(x: Tensor) -> int | None:
    """Return a number for the bits of a tensor as it lies, which shows any change; None where they cannot be read."""
    is_on_host = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.layout is torch.strided
    if not is_on_host or x.numel() == 0 or in_functorch_transform() or not has_memory(x):
        return checksum_on_device(x) if may_wait_for(x) and x.numel() else None
    if x.nbytes <= 2**14 and x.is_contiguous():  # Not their sum, but as good, and without NumPy.
        return hash(string_at(x.data_ptr(), x.nbytes))
    array = array_of(x)
    if array.ndim == 0 or array.strides[-1] != array.itemsize:
        array = np.ascontiguousarray(array).reshape(-1)  # `view` needs a dense last dimension.
    # As long integers where that is possible, which takes a quarter of the time. A sum of integers wraps in silence.
    is_even = array.shape[-1] * array.itemsize % 8 == 0
    return int(array.view(np.int64 if is_even else INTEGERS[array.itemsize]).sum(dtype=np.int64))


class Tail:
    """A sample of the last tensor that a function saved, taken again in each replay."""

    __slots__ = ("error", "expected", "found")

    def __init__(self, expected: Digest):
        self.expected = expected
        self.found: Digest = []
        """The sample of the last replay."""
        self.error = 0.0
        """How far it is off, relative to its size."""

    @classmethod
    def of(cls, tensor: Tensor) -> "Tail | None":
        """Return the sample of a first run; None where values cannot be read."""
        return cls(digest_of(tensor)) if (can_digest(tensor) or may_wait_for(tensor)) and has_memory(tensor) else None

    def compare(self, name: str, tensor: Tensor, *, is_rounded: bool) -> None:
        """Note by how much a replay's last saved tensor is off; raise if it is, and the replay's input was not."""
        self.error = 0.0
        if not has_memory(tensor):
            return
        self.found = digest_of(tensor)
        if self.found == self.expected:
            return
        size, dtype = math.hypot(*self.expected), tensor.dtype
        if not math.isfinite(size):
            return  # NaN and inf are the model's own.
        distance = math.dist(self.expected, self.found)
        self.error = distance / size if size else math.inf
        # Two runs on one input may differ in the last places, say for the alignment of memory.
        noise = NOISE * torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0
        if not is_rounded and not distance <= noise * size:
            raise not_the_same(name, "on the input that it had in the forward pass")
