"""Second runs that stop once every slot is filled (rule 7), and the check that they came to the same tensor.

It is the lowest function of a run whose result nobody needs, and every function where inputs are kept. What such a
function returns is not compared, so a sample of the last tensor that it saved is.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from revnet._torch_internals import forward_mode_level, next_sequence_number
from revnet.engine._digest import Digest, can_digest, digest_of, has_memory
from revnet.engine._tensors import storage_key, version_of
from revnet.errors import ReconstructionError

if TYPE_CHECKING:
    from revnet.engine._record import RecordedCall, Saved

NOISE = 1024.0
"""Units in the last place by which two runs of one function on one input may differ."""


def not_the_same(name: str, how: str) -> ReconstructionError:
    """Return the error for a function that gives other numbers when it runs again."""
    return ReconstructionError(
        f"`{name}` gave other numbers when it ran again, {how}: it draws random numbers outside of PyTorch or from a "
        "generator of its own, keeps state in attributes, or reads a tensor that has changed since the forward pass. "
        "Draw with PyTorch's global generator, keep state in buffers, pass tensors as arguments, or keep the block's "
        "activations with the policy `Store()`."
    )


def lasting_test(call: "RecordedCall", lasting: set[int]) -> Callable[[Tensor], bool]:
    """Return the test whether a tensor outlives the call; a miss is harmless, since it is rebuilt then."""
    if forward_mode_level() < 0:
        return lambda tensor: id(tensor) in lasting or id(tensor._base) in lasting
    # Forward mode saves the primal of a dual tensor, which is another object with the same storage.
    known = (*call.parameters, *call.buffers, *call.surroundings.arguments)
    keys = {storage_key(each) for each in known} - {None}
    return lambda tensor: id(tensor) in lasting or storage_key(tensor) in keys


def make_pack(call: "RecordedCall", saved: "Saved", nodes: list[int]) -> Callable[[Tensor], int]:
    """Return a hook for a first run that also notes which operation saved each tensor."""
    is_lasting = lasting_test(call, call.lasting)
    tensors, versions = saved.tensors, saved.versions
    assert tensors is not None
    assert versions is not None

    def pack(tensor: Tensor) -> int:
        if is_lasting(tensor):
            saved.others.append(tensor)
            saved.other_versions.append(version_of(tensor))
            return -len(saved.others)
        versions.append(version_of(tensor))
        tensors.append(tensor)
        nodes.append(next_sequence_number())
        return len(tensors) - 1

    return pack


class StopReplay(BaseException):
    """Stops a replay once every slot is filled. A BaseException so that user code does not catch it."""


def make_replay_pack(
    call: "RecordedCall", caught: list[Tensor], versions: list[int], lasting: set[int], stop_after: int
) -> Callable[[Tensor], Tensor]:
    """Return a hook for a second run that notes versions, and stops the run after `stop_after` tensors."""
    is_lasting = lasting_test(call, lasting)

    def pack(tensor: Tensor) -> Tensor:
        if is_lasting(tensor):
            return tensor
        tensor = tensor.detach()
        caught.append(tensor)
        versions.append(version_of(tensor))
        if len(caught) == stop_after:
            raise StopReplay
        return tensor

    return pack


def stop_after(tensors: Sequence[Tensor], nodes: Sequence[int], sources: Sequence[Tensor]) -> int:
    """Return after how many saved tensors a replay may stop; -1 if it must run to the end.

    An operation saves its inputs before it computes, so the last one need not compute at all. But some save room for
    what they are about to compute (RReLU's noise): those must.
    """
    keys = {storage_key(each) for each in sources}
    is_complete = [
        tensor.grad_fn is not None or storage_key(tensor) in keys
        for tensor, node in zip(tensors, nodes, strict=True)
        if node == nodes[-1]
    ]
    return len(tensors) if all(is_complete) else -1


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
        return cls(digest_of(tensor)) if can_digest(tensor) and has_memory(tensor) else None

    def compare(self, call: "RecordedCall", tensor: Tensor, *, is_rounded: bool) -> None:
        """Note by how much a replay's last saved tensor differs from the first run's.

        Raises:
            ReconstructionError: The input of the replay is bit for bit the one of the first run, and the tensor is not.
        """
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
            raise not_the_same(call.name, "on the input that it had in the forward pass")
