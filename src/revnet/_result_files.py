"""Files of results: what they may replace, and what a user reads if they cannot be written."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from revnet._paths import expand_user
from revnet.errors import RevnetError

IsOwn = Callable[[Path], bool]
"""Function that returns whether a file is an earlier result of the same kind."""
PICTURE_METADATA = {"Software": "revnet"}
"""Metadata of a PNG file, by which pictures of revnet are recognized."""
_PNG_HEAD = b"\x89PNG\r\n\x1a\n"
_PICTURE_MARK = b"tEXtSoftware\0revnet"
_MARK_WITHIN = 1024
"""Bytes at the start of a PNG file, before its pixels, in which the mark is looked for."""


def make_results_folder(name: str, folder: Path, files: Mapping[str, IsOwn]) -> None:
    """Create a folder for results before the work, and raise if a result would replace another file.

    Args:
        name: Name of the argument with the folder.
        folder: The folder.
        files: Names of the files to write, each with the function that recognizes an earlier result.

    Raises:
        ValueError: The folder cannot be created, or holds another file with one of the names.
    """
    with writing_to(name, folder):
        folder.mkdir(parents=True, exist_ok=True)
    check_replaced(name, folder, files)


def check_replaced(name: str, folder: Path, files: Mapping[str, IsOwn]) -> None:
    """Raise if `folder` holds a file with one of the names that is not an earlier result.

    The arguments are as in `make_results_folder`.
    """
    for file, is_own in files.items():
        if not may_replace(folder / file, is_own):
            raise ValueError(
                f"`{name}` (='{folder}') holds another `{file}`, which would be replaced; pass another folder, or "
                "rename the file."
            )


def may_replace(path: Path, is_own: IsOwn) -> bool:
    """Return whether a result may be written to `path`: nothing exists there, or an empty file or earlier result."""
    if not os.path.isfile(path) or not path.stat().st_size:  # noqa: PTH113 - `Path` may raise
        return True
    try:
        return is_own(path)
    except OSError:  # A file that cannot be read is not known to be a result.
        return False


def begins_with(head: bytes) -> IsOwn:
    """Return the function that recognizes a text file by its first bytes."""
    return lambda path: _read_head(path, len(head)) == head


def is_picture(path: Path) -> bool:
    """Return whether a file is a PNG file that revnet has written."""
    head = _read_head(path, _MARK_WITHIN)
    return head.startswith(_PNG_HEAD) and _PICTURE_MARK in head


@contextmanager
def writing_to(name: str, place: str | Path, kind: Literal["file", "folder"] = "folder") -> Iterator[None]:
    """Raise an error that names the argument if the body cannot write to it, for instance to a disk that is full.

    Args:
        name: Name of the argument.
        place: The argument, a file or a folder.
        kind: What it is.

    Raises:
        ValueError: The body has failed to write to `place`, or to a file in it.
    """
    place = expand_user(place)
    try:
        yield
    except OSError as error:
        if isinstance(error, RevnetError) or not _is_within(error.filename, place):
            raise
        raise ValueError(
            f"`{name}` (='{place}') cannot be written: {error.strerror}; pass a {kind} that you can write to."
        ) from error


def _is_within(file: object, place: Path) -> bool:
    """Return whether an error is about `place`: a file in it, or a folder above it, which cannot be made."""
    if not isinstance(file, str | os.PathLike):
        return False
    named, folder = Path(os.path.realpath(os.fspath(file))), Path(os.path.realpath(place))
    return named.is_relative_to(folder) or folder.is_relative_to(named)


def _read_head(path: Path, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(num_bytes)
