"""What the parts of `gpu.py` have in common: each yields rows as it measures, and turns them into lines of the page."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from _memory_page import Row


class PartError(Exception):
    """A part ran to its end, and what it found is not in order."""


@dataclass(frozen=True)
class Setting:
    """Where a part runs, and how much of it."""

    device: torch.device
    quick: bool
    """Tiny sizes and one round: to see that everything runs."""


@dataclass(frozen=True)
class Part:
    """A table of the page, measured in a process of its own."""

    name: str
    """What `--parts` calls it."""
    title: str
    limit_seconds: int
    """The process is ended then, and what it has measured so far is kept."""
    rows: Callable[[Setting], Iterator[Row]]
    lines: Callable[[Sequence[Row]], list[str]]
    """Called with one row or more."""
