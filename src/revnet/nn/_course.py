"""What a reversible block or sequence runs."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from revnet.nn._run import Segment


class Course(NamedTuple):
    """What a module runs."""

    segments: Sequence[Segment]
    """Chains of half-blocks in order, each with its policy."""
    split_dim: int
    num_streams: int
    unsure: type[nn.Module] | None
    """The class of the first block, if its `split_dim` was left out."""
