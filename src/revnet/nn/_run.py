"""Streams in and out of a chain of half-blocks: what blocks and sequences share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revnet._types import TensorPair
from revnet.functional import HalfBlock, inverse, split
from revnet.nn._policy import AbstractPolicy

Segment = tuple[AbstractPolicy, list[HalfBlock]]
"""Consecutive half-blocks, and the policy under which they run."""


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
    y = torch.cat((x1, x2), split_dim)
    if run is not None:
        # Hold the halves of the caller's own output rather than a second copy of them.
        run.hold(*y.detach().split((x1.shape[split_dim], x2.shape[split_dim]), split_dim))
    return y


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
