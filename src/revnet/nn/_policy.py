"""What a sequence does with the activations of a block: keep them, or rebuild them.

A policy is an object, not a flag: it says what it costs in memory, time and accuracy. Blocks of one sequence may have
different ones.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from revnet.functional import HalfBlock, ReversibleRun, run_reversible, stored


class AbstractPolicy(abc.ABC):
    """Runs consecutive half-blocks, and decides what the backward pass will find."""

    @abc.abstractmethod
    def run(
        self,
        half_blocks: Sequence[HalfBlock],
        x1: Tensor,
        x2: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor, ReversibleRun | None]:
        """Run `half_blocks` on the streams.

        Returns:
            The streams after them, and the run that holds these streams for the backward pass, if one does.
        """


@dataclass(frozen=True)
class Reverse(AbstractPolicy):
    """Rebuild the activations in the backward pass: memory that does not grow with depth. The default.

    Memory: the final pair of streams, and the activations of one residual function at a time.
    Time: one more forward pass of each residual function, in theory a third more per step.
    Accuracy: the output is exact; gradients carry the rounding of the rebuilt streams, which grows with depth.
    """

    def run(
        self,
        half_blocks: Sequence[HalfBlock],
        x1: Tensor,
        x2: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor, ReversibleRun | None]:
        """Run `half_blocks`, keeping only the final pair of streams."""
        return run_reversible(half_blocks, x1, x2, args, kwargs)


@dataclass(frozen=True)
class Store(AbstractPolicy):
    """Keep the activations, as ordinary autograd does: the stored twin.

    Memory: all activations of all blocks. Time: no recomputation. Accuracy: plain autograd's.
    """

    def run(
        self,
        half_blocks: Sequence[HalfBlock],
        x1: Tensor,
        x2: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor, ReversibleRun | None]:
        """Run `half_blocks` by ordinary autograd."""
        return *stored(half_blocks, x1, x2, args, kwargs), None
