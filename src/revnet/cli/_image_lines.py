"""What the commands with a line per image have in common."""

from collections.abc import Sequence
from pathlib import Path

from revnet._atomic_file import open_early
from revnet._image_files import IMAGE_SUFFIXES
from revnet._outside_text import encodable, printable
from revnet.cli._errors import UsageError

_WEIGHTS_SUFFIXES = (".safetensors", ".ckpt")
_WIDEST = 60
"""Largest width of the column of file names."""


def open_place(flag: str, place: str | None) -> Path | None:
    """Return the table to write, once it is known that its folder exists and that it replaces no image or weights."""
    if place is None:
        return None
    path = Path(place).expanduser()
    if path.suffix.lower() in (*IMAGE_SUFFIXES, *_WEIGHTS_SUFFIXES):
        raise UsageError(
            f"`{flag}` (={place}) is the name of an image or of weights, which the table would replace; put the name "
            f"of the table after `{flag}`."
        )
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(
            f"`{flag}` (={place}) must be a file in a folder that exists; create the folder, or name a file."
        )
    try:
        open_early(path)
    except OSError as error:
        raise UsageError(
            f"`{flag}` (={place}) cannot be written ({error.strerror}); start the process that reads it, or pass "
            "another file."
        ) from error
    return path


def printable_path(path: Path) -> str:
    """Return the name of a file on one line."""
    return printable(encodable(str(path)))


def name_width(files: Sequence[Path]) -> int:
    """Return the width of the column of file names."""
    return min(_WIDEST, max(len(printable_path(file)) for file in files))
