"""Streams in and out of a chain of half-blocks: what blocks and sequences share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from revnet._types import Streams
from revnet.engine.compile import runs_plainly
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
    x: Tensor | Streams,
    split_dim: int,
    num_streams: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    log_dets: list[Tensor] | None = None,
) -> Any:
    """Run `segments` in order on `x`; the output has the form of `x`, a tensor or a tuple.

    The half-blocks put their log-determinants into `log_dets`, if it is given.
    """
    first = segments[0][1][0] if segments else None
    streams, reads = _enter(split(x, split_dim, num_streams), first)
    if log_dets is not None:
        _check_samples(streams[0], split_dim)
    run = None
    for policy, half_blocks in segments:
        if log_dets is not None:
            half_blocks = [half_block._replace(log_dets=log_dets) for half_block in half_blocks]
        streams, run = policy.run(_reading(half_blocks, reads), streams, args, kwargs)
    if reads is not None:  # What is held is the stream itself.
        streams, run = tuple([stream.to(reads) for stream in streams]), None
    if not isinstance(x, Tensor):
        return streams
    y = torch.cat([_apart(stream) for stream in streams], split_dim)
    if run is not None:
        # Hold the parts of the caller's own output rather than a second copy of them.
        run.hold(*y.detach().split([stream.shape[split_dim] for stream in streams], split_dim))
    return y


def sum_log_dets(log_dets: Sequence[Tensor], y: Tensor | Streams) -> Tensor:
    """The log-determinant of a chain that ended in `y`, (B,); zero where no link has one."""
    y1 = y if isinstance(y, Tensor) else y[0]
    return sum(log_dets, start=torch.zeros(len(y1), dtype=y1.real.dtype, device=y1.device))


def _check_samples(x1: Tensor, split_dim: int) -> None:
    if split_dim % x1.dim() == 0:
        raise ValueError(
            f"`split_dim` (={split_dim}) is the batch, so that a sample has no map and no log-determinant of its own; "
            "split along the features."
        )


def _reading(half_blocks: list[HalfBlock], reads: torch.dtype | None) -> list[HalfBlock]:
    return half_blocks if reads is None else [half_block._replace(reads=reads) for half_block in half_blocks]


def _enter(streams: Streams, first: HalfBlock | None) -> tuple[Streams, torch.dtype | None]:
    """The streams made ready, and what functions read if that is another type.

    Under autocast streams are float32, in which they can be rebuilt: functions compute in low precision all the same.
    """
    streams = tuple([stream.float() if is_low_precision(stream) else stream for stream in streams])
    if first is None:
        return streams, None
    entered = tuple([first.coupling.prepare(stream) for stream in streams])
    return entered, streams[0].dtype if entered[0].dtype != streams[0].dtype else None


def is_low_precision(x: Tensor) -> bool:
    """Whether autocast has made `x` so imprecise that, as a stream, it could hardly be rebuilt."""
    # PyTorch knows no autocast on the meta device, and raises when asked whether it is on.
    device_type = x.device.type
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and torch.amp.is_autocast_available(device_type)
        and torch.is_autocast_enabled(device_type)
    )


def _apart(stream: Tensor) -> Tensor:
    """The stream, so that the gradient which comes through here is a tensor of its own.

    The halves of a joined gradient are views of it, and one of them waits for the last residual function: it would keep
    the whole.
    """
    if torch.compiler.is_dynamo_compiling() or runs_plainly() or not stream.requires_grad:
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
    y: Tensor | Streams,
    split_dim: int,
    num_streams: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Undo `half_blocks` on `y`; the result has the form of `y`, a tensor or a tuple."""
    streams, reads = _enter(split(y, split_dim, num_streams), half_blocks[0] if half_blocks else None)
    streams = inverse(_reading(list(half_blocks), reads), streams, args, kwargs)
    if reads is not None:
        streams = tuple([stream.to(reads) for stream in streams])
    return torch.cat(streams, split_dim) if isinstance(y, Tensor) else streams
