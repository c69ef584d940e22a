"""Samples of tensors as plain numbers on the host, so that a run remembers streams without tensor memory.

Samples are read from memory without PyTorch operators, so that a measured step equals a predicted one.
"""

import math
from collections.abc import Sequence
from ctypes import string_at
from typing import Any

import torch
from torch import Tensor, nn

from revnet._torch_internals import in_functorch_transform
from revnet.engine._arrays import DTYPES, array_of, digest_of_array, reader_of, sum_of_bits
from revnet.engine._careful import not_the_same
from revnet.engine._device_digest import checksum_on_device, may_sample, may_wait_for, sample_on_device
from revnet.engine._saved_samples import CHECKSUM_INTERVAL, different, may_vary, noise_of, sample_all

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
    return sum_of_bits(array_of(x))


class Tail:
    """Sample of the last tensor that a function computed and saved, taken again in each replay; in some runs, of all.

    The function's inputs, which it may save later, say nothing about what it computed.
    """

    __slots__ = ("actual", "error", "expected", "index", "others", "suspects")

    def __init__(self, expected: Digest, index: int, others: dict[int, Any]):
        self.expected, self.index, self.others = expected, index, others
        self.suspects: dict[int, Any] = {}  # Those that the last replay computed differently, from a rebuilt input.
        self.actual: Digest = []  # Sample of the last replay.
        self.error = 0.0  # Relative error of that sample.

    @classmethod
    def of(cls, call: Any, tensors: Sequence[Tensor], nodes: list[int], own: tuple[Any, ...]) -> "Tail | None":
        """Return the sample of a first run with result and inputs `own`, or None if the values cannot be read."""
        index, inputs = len(tensors) - 1, set(map(id, own[1:]))
        while index >= 0 and (
            not inputs.isdisjoint((id(tensor := tensors[index]), id(tensor._base)))
            or (tensor.grad_fn is None and may_vary(tensor, own[0], nodes[index]))
        ):
            index -= 1
        can_read = index >= 0 and (can_digest(tensors[index]) or may_sample(tensors[index]))
        expected = digest_of(tensors[index]) if can_read and has_memory(tensors[index]) else []
        others = {} if call.plan.num_calls % CHECKSUM_INTERVAL != 1 else sample_all(call, tensors, nodes, own[0])
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
