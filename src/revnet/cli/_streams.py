"""Standard output and standard error that may be closed, full, or unable to print a letter."""

import codecs
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any

_BYTES_OR_REPLACE = "revnet.bytes-or-replace"
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EPIPE)


@dataclass
class StreamStatus:
    """Outcome of a command."""

    status: int = 0
    """Exit status."""


@contextmanager
def safe_streams() -> Iterator[StreamStatus]:
    """Run a command so that its output never ends in a traceback, and yield an object for its exit status.

    A stream that is closed takes everything and prints nothing. A letter that a stream cannot encode is printed as a
    question mark. A reader that has closed the pipe ends the command quietly, as in `revnet models | head -1`, and an
    output that is full ends it with one line.
    """
    outcome = StreamStatus()
    _open_missing()
    with _replacing_letters():
        try:
            yield outcome
            sys.stdout.flush()
        except OSError as error:
            if error.filename is not None or error.errno not in _CANNOT_WRITE:
                raise
            outcome.status = _report(error, outcome.status)
        with suppress(OSError):
            sys.stderr.flush()
            return
        _discard(sys.stderr)


@contextmanager
def print_while_writing(has_files: bool = True) -> Iterator[Callable[[str], None]]:
    """Yield a function that prints lines, for a command that also writes files.

    Once the lines cannot be written, for instance because the reader has closed the pipe, the function prints nothing,
    so that `revnet score RUN photos --csv scores.csv | head -1` writes the whole file. The error is raised at the end.

    Args:
        has_files: Whether there are files to write. If not, the error is raised at once.
    """
    failure: OSError | None = None

    def print_line(line: str) -> None:
        nonlocal failure
        if failure is not None:
            return
        try:
            print(line, flush=True)
        except OSError as error:
            if not has_files or error.errno not in _CANNOT_WRITE:
                raise
            failure = error

    yield print_line
    if failure is not None:
        raise failure


def _report(error: OSError, status: int) -> int:
    """Print that the output cannot be written, unless the command has failed already, and return the exit status."""
    _discard(sys.stdout)
    if isinstance(error, BrokenPipeError):  # the reader has closed the pipe
        return 128 + signal.SIGPIPE
    if status == 0:
        with suppress(OSError):
            print(f"revnet: error: the output cannot be written: {error.strerror}", file=sys.stderr)
    return status or 2


def _discard(stream: Any) -> None:
    """Let the rest of a stream vanish, so that Python does not fail again when it flushes the stream at the end."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _open_missing() -> None:
    """Open the standard streams that are closed: a file of the command would get their numbers otherwise."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the smallest number that is free
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - open until the process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123


@contextmanager
def _replacing_letters() -> Iterator[None]:
    changed = []
    for stream in (sys.stdout, sys.stderr):
        # In the locale C, the names of files are printed by their bytes, which fails for other letters.
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            changed.append((stream, stream.errors))
            stream.reconfigure(errors="replace" if stream.errors == "strict" else _BYTES_OR_REPLACE)
    try:
        yield
    finally:
        for stream, errors in changed:
            if not stream.closed:
                with suppress(OSError):
                    stream.reconfigure(errors=errors)


def _bytes_or_replace(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("replace")(error)


codecs.register_error(_BYTES_OR_REPLACE, _bytes_or_replace)
