"""Streams in and out of a chain of half-blocks: what blocks and sequences share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from revnet._types import TensorPair
from revnet.functional import HalfBlock, inverse, split
from revnet.nn._policy import AbstractPolicy

Segment = tuple[AbstractPolicy, list[HalfBlock]]
"""Consecutive half-blocks, and the policy under which they run."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its `forward`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (not torch.compiler.is_dynamo_compiling() and _has_any_global_hook())
    )


def run_forward(
    segments: Sequence[Segment],
    x: Tensor | TensorPair,
    split_dim: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run `segments` in order on `x`; the output has the form of `x`, a tensor or a pair."""
    x1, x2 = split(x, split_dim)
    run = None
    for policy, half_blocks in segments:
        x1, x2, run = policy.run(half_blocks, x1, x2, args, kwargs)
    if not isinstance(x, Tensor):
        return x1, x2
    y = torch.cat((_apart(x1), _apart(x2)), split_dim)
    if run is not None:
        # Hold the halves of the caller's own output rather than a second copy of them.
        run.hold(*y.detach().split((x1.shape[split_dim], x2.shape[split_dim]), split_dim))
    return y


def _apart(stream: Tensor) -> Tensor:
    """The stream, so that the gradient which comes through here is a tensor of its own.

    The halves of a joined gradient are views of it, and one of them waits for the last residual function: it would keep
    the whole.
    """
    if torch.compiler.is_dynamo_compiling() or not stream.requires_grad:
        return stream
    stream = stream.view_as(stream)
    stream.register_hook(_own)
    return stream


def _own(grad: Tensor | None) -> Tensor | None:
    try:
        is_part = grad is not None and grad.untyped_storage().nbytes() > grad.nbytes
    except NotImplementedError:  # Wrapped by a transform of `torch.func`.
        return grad
    return grad.clone() if grad is not None and is_part else grad


def run_inverse(
    half_blocks: Sequence[HalfBlock],
    y: Tensor | TensorPair,
    split_dim: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Undo `half_blocks` on `y`; the result has the form of `y`, a tensor or a pair."""
    y1, y2 = split(y, split_dim)
    x1, x2 = inverse(half_blocks, y1, y2, args, kwargs)
    return torch.cat((x1, x2), split_dim) if isinstance(y, Tensor) else (x1, x2)
