"""The schedule of a reversible block or sequence: the chains that it runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from revnet.nn.blocks._run import Segment


@dataclass(frozen=True)
class Schedule:
    """The chains that a module runs, and how it splits its input."""

    segments: Sequence[Segment]
    """Chains of half-blocks in order, each with its policy."""
    split_dim: int
    """Dimension along which a tensor input is split."""
    num_streams: int
    """Number of streams."""
    ambiguous: type[nn.Module] | None
    """Class of the first block if its `split_dim` was left out, so that a three-dimensional input is ambiguous."""


class ModuleCache:
    """A cache in a module. It refers to the module's functions, so a copy of the module starts with an empty one."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
