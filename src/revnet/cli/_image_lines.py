"""What the commands with a line per image have in common."""

from collections.abc import Sequence
from pathlib import Path

from revnet._outside_text import encodable, printable

_WIDEST = 60
"""Largest width of the column of file names."""


def printable_path(path: Path) -> str:
    """Return the name of a file on one line."""
    return printable(encodable(str(path)))


def name_width(files: Sequence[Path]) -> int:
    """Return the width of the column of file names."""
    return min(_WIDEST, max(len(printable_path(file)) for file in files))
