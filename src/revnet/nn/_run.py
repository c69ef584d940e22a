"""Streams in and out of chains: what blocks and sequences share."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from revnet._types import Streams
from revnet.engine import Chain, ToleranceKeeper, inverse, prepare
from revnet.nn._policy import AbstractPolicy

Segment = tuple[AbstractPolicy, Chain]
"""Consecutive half-blocks, and the policy under which they run."""

_OWN = "_kwargs"
ROLES = ("f", "g")
"""The names of residual functions to which a caller can pass arguments alone, as `f_kwargs` and `g_kwargs`."""


def run_forward(
    segments: Sequence[Segment],
    x: Tensor | Streams,
    split_dim: int,
    num_streams: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    log_dets: list[Tensor] | None = None,
    tolerance: ToleranceKeeper | None = None,
) -> Any:
    """Run `segments` in order on `x`; the output has the form of `x`, a tensor or a tuple.

    The half-blocks add up their log-determinants in `log_dets`, if it is given.
    """
    coupling = segments[0][1].half_blocks[0].coupling if segments else None
    streams, input_dtype = prepare(x, split_dim, num_streams, coupling)
    if log_dets is not None:
        _check_samples(streams[0], split_dim)
    own_kwargs = _take_own(kwargs, segments) if kwargs else {}
    chain = None
    for policy, unbound in segments:
        chain = unbound.bind(args, kwargs, own_kwargs)
        chain.input_dtype, chain.log_dets, chain.tolerance = input_dtype, log_dets, tolerance
        streams = policy.run(chain, streams)
    if input_dtype is not None:  # What is held is the stream itself, not its copy in another dtype.
        streams, chain = tuple([stream.to(input_dtype) for stream in streams]), None
    if not isinstance(x, Tensor):
        return streams
    if chain is None:
        chain = Chain(()).bind()
    return chain.joined(streams, split_dim)


def _take_own(kwargs: dict[str, Any], segments: Sequence[Segment]) -> dict[str, Mapping[str, Any]]:
    """Take the arguments of single functions, `f_kwargs` and `g_kwargs`, out of `kwargs`."""
    own: dict[str, Mapping[str, Any]] = {}
    for role in ROLES:
        given = kwargs.pop(role + _OWN, None)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise TypeError(
                f"`{role}_kwargs` (={type(given).__name__}) must be a dict of keyword arguments for `{role}` alone, "
                f"such as {role}_kwargs={{'mask': mask}}."
            )
        names = [half_block.role for _, chain in segments for half_block in chain.half_blocks]
        if role not in names:
            raise TypeError(
                f"`{role}_kwargs` is for residual functions named `{role}`, of which there are none here, but "
                f"{', '.join(sorted({f'`{name}`' for name in names}))}; pass the arguments to all functions."
            )
        both = [name for name in given if name in kwargs]
        if both:
            raise TypeError(
                f"`{both[0]}` is in `{role}_kwargs` and among the arguments of all functions; pass it once."
            )
        own[role] = given
    return own


def sum_log_dets(log_dets: Sequence[Tensor], y: Tensor | Streams) -> Tensor:
    """Return the log-determinant of a chain that ended in `y`, (B,); zero where no half-block has one."""
    y1 = y if isinstance(y, Tensor) else y[0]
    return sum(log_dets, start=torch.zeros(len(y1), dtype=y1.real.dtype, device=y1.device))


def _check_samples(x1: Tensor, split_dim: int) -> None:
    if split_dim % x1.dim() == 0:
        raise ValueError(
            f"`split_dim` (={split_dim}) is the batch, so that a sample has no map and no log-determinant of its own; "
            "split along the features."
        )


def run_inverse(
    chain: Chain,
    y: Tensor | Streams,
    split_dim: int,
    num_streams: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Undo the half-blocks of `chain` on `y`; the result has the form of `y`, a tensor or a tuple."""
    coupling = chain.half_blocks[0].coupling if chain.half_blocks else None
    streams, input_dtype = prepare(y, split_dim, num_streams, coupling, name="y")
    own_kwargs = _take_own(kwargs, [(None, chain)]) if kwargs else {}  # type: ignore[list-item]
    bound = chain.bind(args, kwargs, own_kwargs)
    bound.input_dtype = input_dtype
    streams = inverse(bound, streams)
    if input_dtype is not None:
        streams = tuple([stream.to(input_dtype) for stream in streams])
    return torch.cat(streams, split_dim) if isinstance(y, Tensor) else streams
