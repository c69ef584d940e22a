"""Checks of the streams of a coupling, and of the results of residual functions."""

import torch
from torch import Tensor

from revnet._checks import describe_kind
from revnet._torch_internals import forward_mode_level


def check_real(x: Tensor, coupling: object) -> None:
    """Raise if the stream `x` is complex, for a coupling that needs real ones."""
    if x.is_complex():
        raise TypeError(
            f"`x` has dtype {x.dtype}, but {coupling} needs real streams; use `Additive()` for complex ones, or "
            "`fraction_bits=None` in a method of conversion."
        )


def check_residual(x: Tensor, residual: Tensor, name: str) -> None:
    """Raise if the residual cannot be combined with the stream `x`."""
    if not isinstance(residual, Tensor):
        raise TypeError(
            f"`{name}` returned {describe_kind(residual)}, but must return one tensor, which is added to a stream."
        )
    if residual.shape != x.shape:
        raise ValueError(
            f"`{name}` returned shape {tuple(residual.shape)}, but must return the shape of the stream to which it is "
            f"added, {tuple(x.shape)}; a block that changes the shape is not reversible: put it between two sequences."
        )
    if torch.promote_types(x.dtype, residual.dtype) != x.dtype:
        raise TypeError(
            f"`{name}` returned {residual.dtype}, but the stream to which it is added is {x.dtype}, which would change "
            f"and could not be rebuilt; cast the stream up with `x.to({residual.dtype})`, or the residual down."
        )


def is_differentiated(y: Tensor, residual: Tensor) -> bool:
    """Return whether derivatives of an inverse may be needed, in reverse or in forward mode."""
    if torch.is_grad_enabled() and (y.requires_grad or residual.requires_grad):
        return True
    return not torch.compiler.is_dynamo_compiling() and forward_mode_level() >= 0
