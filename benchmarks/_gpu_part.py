"""The interface of the parts of `gpu.py`: a part yields rows and turns them into lines of the page."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from _memory_page import Row


class PartError(Exception):
    """Raised when a part ran to its end but found failures."""


@dataclass(frozen=True)
class Setting:
    """Device and size of a run."""

    device: torch.device
    quick: bool
    """Whether to use tiny sizes and one round, to check that everything runs."""


@dataclass(frozen=True)
class Part:
    """A table of the page, measured in a separate process."""

    name: str
    """Name of the part in `--parts`."""
    title: str
    limit_seconds: int
    """Time limit of the process. Rows measured before it are kept."""
    rows: Callable[[Setting], Iterator[Row]]
    lines: Callable[[Sequence[Row]], list[str]]
    """Function that turns one or more rows into lines of the page."""
