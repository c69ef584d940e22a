"""Samples of tensors as plain numbers on the host, so that a run remembers streams without tensor memory.

Samples are read from memory without PyTorch operators, so that a measured step equals a predicted one.
"""

import math
from collections.abc import Sequence
from ctypes import string_at
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from revnet._torch_internals import in_functorch_transform
from revnet.engine._arrays import DTYPES, INTEGERS, array_of, digest_of_array, reader_of
from revnet.engine._careful import not_the_same
from revnet.engine._device_digest import checksum_on_device, may_sample, may_wait_for, sample_on_device
from revnet.engine._saved_samples import CHECKSUM_INTERVAL, different, noise_of, sample_all

Digest = list[float]


def can_digest(x: Tensor) -> bool:
    """Return whether NumPy can read the tensor's values without waiting for a device."""
    is_strided = type(x) is Tensor and x.device.type == "cpu" and x.layout is torch.strided
    return is_strided and x.dtype in DTYPES and not in_functorch_transform()


def has_memory(x: Tensor) -> bool:
    """Return whether a tensor's memory is allocated; FSDP frees the memory of a parameter after its function ran."""
    return x.untyped_storage().nbytes() >= x.nbytes and x.data_ptr() != 0


def digest_of(x: Tensor) -> Digest:
    """Return a sample of a tensor's elements, spread over all dimensions; `can_digest` must hold."""
    if x.device.type != "cpu":
        return sample_on_device(x)
    read, every = reader_of(x.dtype, x.numel())
    if read is None or not x.is_contiguous():
        return digest_of_array(array_of(x))
    digest: Digest = read(x.data_ptr())[every]
    return digest


def checksum(x: Tensor) -> int | None:
    """Return a checksum of a tensor's memory, which shows any change, or None if the memory cannot be read."""
    is_on_host = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.layout is torch.strided
    if not is_on_host or x.numel() == 0 or in_functorch_transform() or not has_memory(x):
        return checksum_on_device(x) if may_wait_for(x) and x.numel() else None
    if x.nbytes <= 2**14 and x.is_contiguous():  # A hash serves as well as a sum, and needs no NumPy.
        return hash(string_at(x.data_ptr(), x.nbytes))
    array = array_of(x)
    if array.ndim == 0 or array.strides[-1] != array.itemsize:
        array = np.ascontiguousarray(array).reshape(-1)  # `view` needs a dense last dimension.
    # As long integers if possible, which takes a quarter of the time. Sums of integers wrap around silently.
    is_even = array.shape[-1] * array.itemsize % 8 == 0
    return int(array.view(np.int64 if is_even else INTEGERS[array.itemsize]).sum(dtype=np.int64))


class Tail:
    """Sample of the last tensor that a function saved, taken again in each replay; in some runs, of all of them."""

    __slots__ = ("actual", "error", "expected", "index", "others", "suspects")

    def __init__(self, expected: Digest, index: int, others: dict[int, Any]):
        self.expected, self.index, self.others = expected, index, others
        self.suspects: dict[int, Any] = {}  # Those that the last replay computed differently, from a rebuilt input.
        self.actual: Digest = []  # Sample of the last replay.
        self.error = 0.0  # Relative error of that sample.

    @classmethod
    def of(cls, call: Any, tensors: Sequence[Tensor], nodes: Sequence[int], result: Any) -> "Tail | None":
        """Return the sample of a first run, or None if the values cannot be read."""
        index = len(tensors) - 1
        while index >= 0 and not (tensors[index].is_floating_point() or tensors[index].is_complex()):
            index -= 1  # Integers may be a workspace, such as oneDNN's for an LSTM, with parts that have no value.
        can_read = index >= 0 and (can_digest(tensors[index]) or may_sample(tensors[index]))
        expected = digest_of(tensors[index]) if can_read and has_memory(tensors[index]) else []
        others = {} if call.plan.num_calls % CHECKSUM_INTERVAL != 1 else sample_all(call, tensors, nodes, result)
        return cls(expected, index, others) if expected or others else None

    def compare(self, name: str, tensors: Sequence[Tensor], *, is_rounded: bool) -> None:
        """Compute the error of the same tensor in a replay; raise if there is one and the replay's input had none."""
        self.error, tensor = 0.0, tensors[self.index]
        self.actual = digest_of(tensor) if self.expected and has_memory(tensor) else self.expected
        # Otherwise the model produced NaN or inf, here or in a later function, which is undone first.
        if self.actual != self.expected and math.isfinite((size := math.hypot(*self.expected)) + sum(self.actual)):
            self.error = math.dist(self.expected, self.actual) / size if size else math.inf
        self.suspects = different(self.others, tensors, is_rounded=is_rounded) if self.others else {}
        if not is_rounded and (self.suspects or (self.error and self.error > noise_of(torch.finfo(tensor.dtype).eps))):
            raise not_the_same(name, "on the same input as in the forward pass")
