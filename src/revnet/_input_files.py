"""Reading of files that others wrote: regular files only, and no more bytes than expected."""

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_SPARSE_FROM = 2**26
"""Size of a file from which it is checked for holes, in bytes."""
_FULLNESS = 64
"""A file has holes if less than one byte in this number is stored."""


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading, without waiting for a writer as a FIFO would.

    Links are followed.

    Raises:
        OSError: The file cannot be opened, is not a regular file, or consists of holes, which can have any size.
    """
    # Without O_NONBLOCK, opening a FIFO waits for ever; regular files ignore it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
        if _is_sparse(descriptor, status):
            raise OSError(errno.EINVAL, "A sparse file, with hardly any content", os.fspath(path))
    except OSError:
        os.close(descriptor)
        raise
    return io.BufferedReader(io.FileIO(descriptor))


@contextmanager
def name_in_utf8(path: str | Path) -> Iterator[str]:
    """Yield a name of a regular file for a library that takes names in UTF-8 only.

    It is the path itself, except for a path that is not UTF-8.

    Raises:
        OSError: The file cannot be opened, is not a regular file, or consists of holes.
    """
    with open_regular(path) as file:
        name = os.fspath(path)
        try:
            name.encode()
        except UnicodeEncodeError:
            name = f"/dev/fd/{file.fileno()}"
        yield name


def read_bytes(path: str | Path, most_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: The file cannot be opened, is not a regular file, or has more than `most_bytes`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # Python allocates what it is asked for, so it is not asked for the limit.
        content = file.read(size + 1) if size <= most_bytes else b""
    if max(size, len(content)) > most_bytes:
        raise OSError(errno.EFBIG, f"File of more than {most_bytes // 2**10:,} KiB", os.fspath(path))
    return content


def read_text(path: str | Path, most_bytes: int) -> str:
    """Return the content of a regular file of text in UTF-8, without the byte order mark that Windows puts before it.

    Raises:
        OSError: The file cannot be opened, is not a regular file, or has more than `most_bytes`.
        UnicodeDecodeError: The file is not text in UTF-8.
    """
    return read_bytes(path, most_bytes).decode("utf-8").removeprefix("\ufeff")


def _is_sparse(descriptor: int, status: os.stat_result) -> bool:
    size = status.st_size
    if size < _SPARSE_FROM or getattr(status, "st_blocks", size) * 512 * _FULLNESS >= size:
        return False
    # A file system may compress, or may not have stored the last writes: then it knows of no holes.
    if not hasattr(os, "SEEK_DATA"):
        return False
    num_stored, position = 0, 0
    try:
        while position < size and num_stored * _FULLNESS < size:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            position = os.lseek(descriptor, start, os.SEEK_HOLE)
            num_stored += position - start
    except OSError as error:
        if error.errno != errno.ENXIO:  # ENXIO: only a hole is left
            return False
    os.lseek(descriptor, 0, os.SEEK_SET)
    return num_stored * _FULLNESS < size
