"""What a user reads if results cannot be written: the argument that says where, the reason, and the way out."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from revnet._paths import expand_user
from revnet.errors import RevnetError


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
