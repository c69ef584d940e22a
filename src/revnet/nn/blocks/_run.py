"""Parts of a run that a plain step does not need: arguments of single functions, log-determinants, the inverse."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from revnet._checks import describe
from revnet._types import Streams
from revnet.engine import BoundChain, Chain, Recording, inverse, record
from revnet.engine._streams import begin
from revnet.engine._tolerance import ToleranceKeeper
from revnet.nn.policies._policy import AbstractPolicy

Segment = tuple[AbstractPolicy, Chain]
"""A policy, and the consecutive half-blocks that run under it."""

_SUFFIX = "_kwargs"
ROLES = ("f", "g")
"""Names of the residual functions that can have arguments of their own, `f_kwargs` and `g_kwargs`."""


def take_own(kwargs: dict[str, Any], segments: Sequence[Segment]) -> dict[str, dict[str, Any]]:
    """Remove the arguments of single functions, `f_kwargs` and `g_kwargs`, from `kwargs`, and return them."""
    own: dict[str, dict[str, Any]] = {}
    for role in ROLES:
        given = kwargs.pop(role + _SUFFIX, None)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise TypeError(
                f"`{role}_kwargs` (={type(given).__name__}) must be a dict of keyword arguments for only `{role}`, "
                f"such as {role}_kwargs={{'mask': mask}}."
            )
        check_names(role + _SUFFIX, given)
        names = [half_block.role for _, chain in segments for half_block in chain.half_blocks]
        if role not in names:
            raise TypeError(
                f"`{role}_kwargs` is for residual functions named `{role}`, but the functions here are named "
                f"{', '.join(sorted({f'`{name}`' for name in names}))}; pass the arguments to all functions."
            )
        both = [name for name in given if name in kwargs]
        if both:
            raise TypeError(
                f"`{both[0]}` is in `{role}_kwargs` and among the arguments of all functions; pass it once."
            )
        own[role] = dict(given)
    return own


def check_names(name: str, kwargs: Mapping[Any, Any]) -> None:
    """Raise unless all keys of `kwargs` are strings. `name` is the argument that holds them."""
    for key in kwargs:
        if not isinstance(key, str):
            raise TypeError(
                f"`{name}` has the key {describe(key)}, but keyword arguments have names; pass strings, such as "
                "{'mask': mask}."
            )


def sum_log_dets(log_dets: Sequence[Tensor], y: Tensor | Streams) -> Tensor:
    """Return the log-determinant of a chain with output `y`, of shape (B,). It is zero if no half-block has one."""
    y1 = y if isinstance(y, Tensor) else y[0]
    return sum(log_dets, start=torch.zeros(y1.shape[0], dtype=y1.real.dtype, device=y1.device))


def check_samples(x1: Tensor, split_dim: int) -> None:
    """Raise if the streams have no batch, or are split along it."""
    if x1.dim() == 0:
        raise ValueError(
            "`x1` (of shape ()) must have a batch dimension, since each sample has its own log-determinant; pass a "
            "batch of one."
        )
    if split_dim % x1.dim() == 0:
        raise ValueError(
            f"`split_dim` (={split_dim}) must not be the batch dimension, since each sample has its own "
            "log-determinant; split along the features."
        )


def run_inverse(
    chain: Chain,
    y: Tensor | Streams,
    split_dim: int,
    num_streams: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Compute the input of `chain` from its output `y`. The result is a tensor if `y` is one, else a tuple."""
    coupling = chain.half_blocks[0].coupling if chain.half_blocks else None
    streams, input_dtype = begin(y, split_dim, num_streams, coupling, name="y")
    own_kwargs = take_own(kwargs, [(None, chain)]) if kwargs else {}  # type: ignore[list-item]
    streams = inverse(BoundChain(chain, args, kwargs, own_kwargs, input_dtype), streams)
    return leave(streams, input_dtype, split_dim if isinstance(y, Tensor) else None)


def leave(streams: Sequence[Tensor], dtype: torch.dtype | None, dim: int | None) -> Tensor | Streams:
    """Return streams as a reversible module returns them.

    Args:
        streams: The streams at the end of a chain.
        dtype: Dtype of the module's input, if it differs from the dtype of the streams.
        dim: Dimension along which to join the streams; None leaves them apart.
    """
    if dtype is not None:
        streams = [stream.to(dtype) for stream in streams]
    return tuple(streams) if dim is None else torch.cat(list(streams), dim)


def run_recorded(
    segments: Sequence[Segment],
    streams: Streams,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    input_dtype: torch.dtype | None,
    tolerance: ToleranceKeeper | None,
    *,
    needs_input: bool,
) -> tuple[Streams, Recording]:
    """Run chains on streams that `begin` has prepared, and record the pass without holding the output."""
    own_kwargs = take_own(kwargs, segments) if kwargs else {}
    is_plain = input_dtype is None and len(args) + len(kwargs) + len(own_kwargs) == 0
    bound = [
        (
            policy.run,
            BoundChain(chain, args, kwargs, own_kwargs, input_dtype, None, tolerance, is_plain and not chain.mixes),
        )
        for policy, chain in segments
    ]
    streams, recording = record(bound, streams, needs_input=needs_input)
    recording.input_dtype = input_dtype
    return streams, recording
