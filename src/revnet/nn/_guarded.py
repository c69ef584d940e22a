"""Reversal with a bound on the error of what is rebuilt."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revnet._types import Streams
from revnet.engine.compile import runs_plainly
from revnet.functional import Guard, HalfBlock, ReversibleRun, run_reversible
from revnet.nn._policy import AbstractPolicy


class GuardedReverse(AbstractPolicy):
    """`Reverse()` under a guard; what a sequence with a `tolerance` runs.

    Args:
        guard: Knows the bound, and where keyframes are.
    """

    def __init__(self, guard: Guard):
        self._guard = guard

    def run(
        self,
        half_blocks: Sequence[HalfBlock],
        streams: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Streams, ReversibleRun | None]:
        """Run `half_blocks`, keeping the final streams, the first one, and those at keyframes."""
        return run_reversible(half_blocks, streams, args, kwargs, self._guard)


def checked_tolerance(tolerance: float | None) -> float | None:
    """The tolerance, as a float.

    Raises:
        ValueError: It is neither None nor a number between 0 and 1.
    """
    if tolerance is None:
        return None
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance < 1:
        raise ValueError(
            f"`tolerance` (={tolerance!r}) must be a relative error between 0 and 1, such as 1e-3, or None."
        )
    return float(tolerance)


def refuse_to_compile() -> None:
    """Raise under `torch.compile`, where no run can go forward again."""
    if torch.compiler.is_dynamo_compiling() and not runs_plainly():
        raise NotImplementedError(
            "a ReversibleSequential with a `tolerance` cannot be compiled as a whole; reverse exactly with "
            "`set_coupling(model, FixedPoint())`, or compile the residual functions: `block.f.compile()`."
        )
