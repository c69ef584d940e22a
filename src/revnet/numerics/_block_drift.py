"""Drift of single blocks, and what follows from the drift of all blocks."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from revnet.nn import AbstractPolicy


@dataclass(frozen=True)
class GradientDrift:
    """Difference between a gradient from rebuilt activations and the same gradient from stored activations.

    Each gradient counts as one vector.
    """

    relative_error: float
    """Distance between the two, over the length of the stored one."""
    angle_degrees: float
    """Angle between the two."""


@dataclass(frozen=True)
class BlockDrift:
    """Drift of one reversible block."""

    name: str
    """Name in the model, such as "stages.0.blocks.3"."""
    policy: AbstractPolicy
    """Policy of the block."""
    is_exact: bool
    """Whether its couplings promise exact reconstruction."""
    error: float | None
    """Relative error of its rebuilt input, the pair of streams.

    None if the input was not rebuilt: it was kept, or nothing before the block is trained.
    """
    amplification: float | None
    """Factor by which undoing the block multiplied the error of its output; its own rounding adds to it.

    None if the output had no error, or if it was kept.
    """
    gradient: GradientDrift | None = None
    """Drift of the gradient of its parameters; None if gradients were not compared, or if it has no trained ones."""
    remedies: tuple[str, ...] | None = None
    """Ways to reduce the drift of a block that `revnet.convert` made reversible, in sentences; None for other
    blocks."""


def worst_block(blocks: Iterable[BlockDrift]) -> BlockDrift | None:
    """Return the block with the largest error, and of several the last, where the error begins; None without errors."""
    worst, most = None, -1.0
    for block in blocks:
        if block.error is not None:
            rank = block.error if math.isfinite(block.error) else math.inf
            if rank >= most:
                worst, most = block, rank
    return worst


def amplifications(blocks: Iterable[BlockDrift]) -> list[tuple[BlockDrift, float]]:
    """Return the blocks with a finite amplification, and the amplification."""
    return [
        (block, block.amplification)
        for block in blocks
        if block.amplification is not None and math.isfinite(block.amplification)
    ]


def mean_amplification(blocks: Iterable[BlockDrift]) -> float | None:
    """Return the geometric mean of all amplifications; None without any."""
    logs = [math.log(factor) for _, factor in amplifications(blocks) if factor > 0]
    return math.exp(sum(logs) / len(logs)) if logs else None


def rebuilt_runs(blocks: Iterable[BlockDrift]) -> Iterator[list[BlockDrift]]:
    """Yield the runs of blocks whose inputs were rebuilt one from the other."""
    run: list[BlockDrift] = []
    for block in blocks:
        if block.error is not None:
            run.append(block)
        if run and (block.error is None or block.amplification is None):  # a kept stream follows
            yield run
            run = []
    if run:
        yield run
