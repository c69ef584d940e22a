"""What a reversible block or sequence runs, and what it keeps of that."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from torch import nn

from revnet.nn.blocks._run import Segment


class Schedule(NamedTuple):
    """What a module runs."""

    segments: Sequence[Segment]
    """Chains of half-blocks in order, each with its policy."""
    split_dim: int
    num_streams: int
    ambiguous: type[nn.Module] | None
    """The class of the first block, if its `split_dim` was left out."""


class Kept:
    """What a module keeps from call to call. It refers to the module's own functions, so copies begin without it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
