"""Where the reversible blocks of a model are, and what each of them adds to the run that it belongs to."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from revnet.engine import HalfBlock
from revnet.nn.policies._policy import AbstractPolicy


@dataclass(frozen=True, eq=False)
class BlockInRun:
    """A reversible block, and its place among the blocks that run one after the other."""

    name: str
    """Name of the block in the module that lists it, empty for this module itself. From `blocks_in_runs`, the name in
    the model."""
    module: nn.Module
    """The block."""
    policy: AbstractPolicy
    """Policy of the block."""
    half_blocks: Sequence[HalfBlock]
    """The half-blocks that it adds to a run, under the names that they have there. Empty if it never runs reversibly
    with its current settings."""
    row: object
    """Object that all blocks of a row have in common."""
    index: int = 0
    """Position of the block in its row."""
    num_streams: int = 2
    """Number of streams."""
    has_policy: bool = True
    """Whether the policy can be changed."""
    original: nn.Module | None = None
    """What the block computes as an ordinary block, if it was one before it was converted; otherwise None."""
    remedies: tuple[str, ...] | None = None
    """Ways to reduce the drift of a converted block, in sentences; None for other blocks, which take a tolerance and
    other couplings."""


class RunsBlocks(abc.ABC):
    """The interface of modules that run reversible blocks: sequences, single blocks and converted blocks."""

    @abc.abstractmethod
    def blocks_in_run(self) -> list[BlockInRun]:
        """Return the blocks in order."""


def blocks_in_runs(model: nn.Module) -> list[BlockInRun]:
    """Return all reversible blocks of a model: row by row, and each row in the order in which it runs."""
    rows: dict[int, list[BlockInRun]] = {}
    listed: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, RunsBlocks):
            continue
        for block in module.blocks_in_run():
            if not block.name and id(module) in listed:
                continue  # A part of a sequence, which comes before it.
            listed.add(id(block.module))
            named = replace(block, name=".".join(filter(None, (name, block.name))))
            rows.setdefault(id(block.row), []).append(named)
    return [block for row in rows.values() for block in sorted(row, key=lambda block: block.index)]
