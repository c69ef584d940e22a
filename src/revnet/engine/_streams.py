"""Streams: split a tensor into streams, join them, and hold them at one position of a chain."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revnet._torch_internals import in_functorch_transform
from revnet._types import Streams
from revnet.coupling import AbstractCoupling, Additive
from revnet.engine import _careful
from revnet.engine._split import MOST_STREAMS, prepare
from revnet.engine._sums import add_up
from revnet.engine._tracing import runs_plainly

if TYPE_CHECKING:
    from revnet.engine._rebuild import Rebuilder

_USUAL = (torch.float32, torch.float64)


def begin(
    x: Tensor | Streams, dim: int, num_streams: int, coupling: AbstractCoupling | None, *, name: str = "x"
) -> tuple[Streams, torch.dtype | None]:
    """Return the streams that a chain begins with, as `prepare` does, at less cost in the usual case."""
    if isinstance(x, Tensor) and x.dtype in _USUAL and (coupling is None or type(coupling) is Additive):
        is_usual = type(num_streams) is int and 1 < num_streams <= MOST_STREAMS and type(dim) is int
        if is_usual and -x.dim() <= dim < x.dim() and x.shape[dim] % num_streams == 0:
            # Dense copies: kernels are slower on strided views, and may round differently.
            return tuple([part.resolve_neg().clone() for part in x.chunk(num_streams, dim)]), None
    return prepare(x, dim, num_streams, coupling, name=name)


def joined(streams: Streams, dim: int, run: "Rebuilder | None") -> Tensor:
    """Concatenate the streams, and have the run hold views of the output instead of a second copy."""
    if run is None and (torch.compiler.is_dynamo_compiling() or runs_plainly()):
        return torch.cat(streams, dim)
    y = torch.cat([with_own_gradient(stream) for stream in streams], dim)
    if run is not None:
        whole = y.detach()  # Its node would lead back to the run (rule 1).
        run.hold(whole.split([stream.shape[dim] for stream in streams], dim), whole)
    return y


def with_own_gradient(stream: Tensor) -> Tensor:
    """Return the stream, with a hook that copies its gradient out of the joined output's gradient.

    The parts of a joined gradient are views of it. One of them is held until the last residual function, and would keep
    the whole gradient alive.
    """
    if stream.requires_grad:
        stream = stream.view_as(stream)
        stream.register_hook(_copy_if_part)
    return stream


def _copy_if_part(grad: Tensor | None) -> Tensor | None:
    try:
        is_part = grad is not None and grad.untyped_storage().nbytes() > grad.nbytes
    except NotImplementedError:  # Wrapped by a transform of `torch.func`.
        return grad
    return grad.clone() if grad is not None and is_part else grad


class StreamSnapshot:
    """The streams at one position of a chain, with `position` half-blocks before them.

    A snapshot detects writes to its tensors. It is walked back in place: `put` replaces a stream.
    """

    __slots__ = ("held", "origin", "position", "strides", "versions")

    def __init__(self, position: int, tensors: Sequence[Tensor | None], strides: Sequence[tuple[int, ...]]):
        self.position = self.origin = position
        """Current position; `origin` is the position at which the streams were exact."""
        self.strides = strides
        """Strides of each stream in the forward pass. Kernels round differently on another layout."""
        self.held = list(tensors)
        """The streams in their current layout; None for a stream that is not needed."""
        self.versions = [0 if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors]

    def read(self, index: Any) -> Tensor:
        """Return one stream, or the sum of a tuple of them, in the layout that it had in the forward pass."""
        if type(index) is tuple:
            return add_up([self.read(number) for number in index])
        tensor = self.held[index]
        assert tensor is not None
        if tensor._version != self.versions[index]:
            raise _careful.modified_output(tensor, self.versions[index])
        if tensor.stride() != self.strides[index]:
            self._lay_out()
            return self.held[index]
        return tensor

    def _lay_out(self) -> None:
        """Bring all streams into the layout that they had in the forward pass."""
        # All at once: parts of one output share its memory, and a single part would keep all of it.
        for index, tensor in enumerate(self.held):
            if tensor is not None and tensor.stride() != self.strides[index]:
                if tensor._version != self.versions[index]:
                    raise _careful.modified_output(tensor, self.versions[index])
                dense = torch.empty_strided(tensor.shape, self.strides[index], dtype=tensor.dtype, device=tensor.device)
                self.put(index, dense.copy_(tensor))

    def check_memory(self) -> None:
        """Raise if the memory of a stream was freed; reading it would crash."""
        for tensor in self.held:
            if type(tensor) is Tensor and tensor.layout is torch.strided and not in_functorch_transform():
                try:
                    is_gone = tensor.untyped_storage().nbytes() == 0 < tensor.nbytes
                except RuntimeError:  # Batched by a transform that has ended: reading it raises.
                    continue
                if is_gone:
                    raise _careful.freed_output(tensor)

    def put(self, index: int, tensor: Tensor) -> None:
        """Replace one stream."""
        self.held[index] = tensor
        self.versions[index] = tensor._version
