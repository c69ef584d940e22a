"""The two ends of a chain: splitting a tensor into streams, and joining them. What is rare, and errors: `_split`."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from revnet._types import Streams
from revnet.coupling import AbstractCoupling, Additive
from revnet.engine._split import MOST_STREAMS, prepare
from revnet.engine._tracing import runs_plainly

if TYPE_CHECKING:
    from revnet.engine._rebuild import Rebuilder


def begin(
    x: Tensor | Streams, dim: int, num_streams: int, coupling: AbstractCoupling | None, *, name: str = "x"
) -> tuple[Streams, torch.dtype | None]:
    """Return the streams that a chain begins with, and the dtype in which functions read them, if it is not theirs.

    The arguments and errors are the ones of `prepare`.
    """
    if (
        isinstance(x, Tensor)
        and x.dtype in (torch.float32, torch.float64)
        and (coupling is None or type(coupling) is Additive)
        and type(num_streams) is int
        and 1 < num_streams <= MOST_STREAMS
        and type(dim) is int
        and -x.dim() <= dim < x.dim()
        and x.shape[dim] % num_streams == 0
    ):
        # Dense copies: kernels are slower on strided views, and may round differently.
        return tuple([part.clone() for part in x.chunk(num_streams, dim)]), None
    return prepare(x, dim, num_streams, coupling, name=name)


def joined(streams: Streams, dim: int, run: "Rebuilder | None") -> Tensor:
    """Return the streams in one tensor, and have the run hold its parts rather than a second copy."""
    if run is None and (torch.compiler.is_dynamo_compiling() or runs_plainly()):
        return torch.cat(streams, dim)
    y = torch.cat([with_own_gradient(stream) for stream in streams], dim)
    if run is not None:
        run.hold(y.detach().split([stream.shape[dim] for stream in streams], dim))
    return y


def with_own_gradient(stream: Tensor) -> Tensor:
    """Return the stream, with a hook that copies its gradient out of the joined output's gradient.

    The halves of a joined gradient are views of it, and one of them waits for the last residual function: it would keep
    the whole.
    """
    if not stream.requires_grad:
        return stream
    stream = stream.view_as(stream)
    stream.register_hook(_copy_if_part)
    return stream


def _copy_if_part(grad: Tensor | None) -> Tensor | None:
    try:
        is_part = grad is not None and grad.untyped_storage().nbytes() > grad.nbytes
    except NotImplementedError:  # Wrapped by a transform of `torch.func`.
        return grad
    return grad.clone() if grad is not None and is_part else grad
