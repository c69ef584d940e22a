"""Writing a file whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SUFFIX = ".tmp"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and move it to `path` once the body has succeeded.

    The temporary file is in the same folder as `path`, because a rename is atomic within one file system only.
    Lightning, through fsspec, writes to the system's temporary folder and may have to copy from there: a process that
    is killed then leaves half a checkpoint.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_SUFFIX}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # the bytes before the name, since power may fail between the two
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of a run that was killed while it wrote."""
    for path in folder.glob(f".*{_SUFFIX}"):
        path.unlink(missing_ok=True)
