"""Writing a file whole or not at all: the one way in which revnet writes files."""

import csv
import errno
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_SUFFIX = ".tmp"
_LONGEST_STEM = 50
"""Characters of a file's name in the name of its temporary file, since the file system limits the whole."""
_NOT_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF)
_DEVICES = (Path("/dev"), Path("/proc"))
_NO_READER = "A FIFO that no process reads"
_READER_SECONDS = 1.0
"""Time in which the reader of a FIFO must open it."""
_open_fifos: dict[Path, int] = {}
"""Descriptors of FIFOs that are to be written to, by path."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and move it to `path` once the body has succeeded.

    A link is followed, and a file that is replaced keeps its mode and its owner. What is not a regular file, such as
    `/dev/stdout` or a FIFO, is not replaced: the bytes are written into it.

    The temporary file is in the same folder as `path`, because a rename is atomic within one file system only.
    Lightning, through fsspec, writes to the system's temporary folder and may have to copy from there: a process that
    is killed then leaves half a checkpoint.

    Raises:
        OSError: The file cannot be written; the error names it.
    """
    try:
        target = Path(os.path.realpath(path))
        if _is_replaceable(path, target):
            with _replacing(target) as temporary:
                yield temporary
        else:
            with tempfile.TemporaryDirectory() as folder:
                yield (temporary := Path(folder) / "output")
                _copy_into(temporary, path)
    except OSError as error:
        # A full disk has no name, and the temporary file has one that the user does not know.
        if error.errno is None or not (error.filename is None or str(error.filename).endswith(_SUFFIX)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file in UTF-8, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write a CSV file with a head, whole or not at all; what a row lacks stays empty."""
    write_csv(path, [columns, *([row.get(name) for name in columns] for row in rows)])


def open_early(path: Path) -> None:
    """Open `path` now if it is a FIFO, before the work whose result will be written to it.

    It stays open until a file is written to it, because its reader would see the end of the file otherwise.

    Raises:
        OSError: No process reads the FIFO.
    """
    if path.is_fifo() and path not in _open_fifos:
        _open_fifos[path] = _open_with_reader(path)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, where the platform can: a rename is lost without it if power fails."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that can be written to, and not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SYNCED:
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of a run that was killed while it wrote."""
    for path in folder.glob(f".*{_SUFFIX}"):
        path.unlink(missing_ok=True)


def _is_replaceable(path: Path, target: Path) -> bool:
    # `/dev/stdout` may lead to a regular file that the shell has opened: a rename would take it from the shell.
    if any(folder in (path.absolute(), *path.absolute().parents) for folder in _DEVICES) and path.is_symlink():
        return False
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return True
    # A folder is for the rename to refuse, unless the body removes it, as for a checkpoint in shards.
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    temporary = target.with_name(f".{target.name[:_LONGEST_STEM]}.{os.getpid()}{_SUFFIX}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            _keep_mode(file.fileno(), target)
            os.fsync(file.fileno())  # the bytes before the name, since power may fail between the two
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def _keep_mode(descriptor: int, target: Path) -> None:
    if os.name != "posix":
        return
    try:
        before = target.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(before.st_mode):
        return
    with suppress(PermissionError):  # only root may give a file away
        os.fchown(descriptor, before.st_uid, before.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(before.st_mode))


def _copy_into(source: Path, path: Path) -> None:
    # Not created and not truncated, which devices need not support.
    with source.open("rb") as content, os.fdopen(_open_for_writing(path), "wb") as device:
        shutil.copyfileobj(content, device)


def _open_for_writing(path: Path) -> int:
    for stream in (sys.__stdout__, sys.__stderr__):
        # Through the descriptor that is open already, lines printed before and after stay where they are.
        if stream is not None and not stream.closed:
            with suppress(OSError, ValueError):
                if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                    stream.flush()
                    return os.dup(stream.fileno())
    descriptor = _open_fifos.pop(path, None)
    return _open_with_reader(path) if descriptor is None else descriptor


def _open_with_reader(path: Path) -> int:
    """Open `path` for writing; unlike a plain `open`, do not wait for ever for the reader of a FIFO."""
    deadline = time.monotonic() + _READER_SECONDS
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            if error.errno != errno.ENXIO or not path.is_fifo():
                raise
            if time.monotonic() > deadline:
                raise OSError(errno.ENXIO, _NO_READER, str(path)) from error
            time.sleep(0.01)
        else:
            if hasattr(os, "O_NONBLOCK"):
                os.set_blocking(descriptor, True)
            return descriptor
