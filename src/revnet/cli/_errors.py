"""Errors of the command line: which ones print one line, and what that line says."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from revnet._lazy import is_foreign_torchvision
from revnet.errors import MissingDependencyError, RevnetError, install_command

_LONGEST = 2000
"""Characters of the longest line."""


class UsageError(RevnetError, ValueError):
    """The arguments do not fit the command."""


def is_expected(error: BaseException) -> bool:
    """Return whether the user or the machine caused `error`. Any other error is a bug, and keeps its traceback.

    Errors of `revnet.errors`, of the operating system, of memory that runs out and of missing packages are expected.
    The library rejects bad arguments with a plain `ValueError`, `TypeError` or `NotImplementedError`, as PyTorch does.
    These are expected only if revnet's own code raised them: the same types out of another package are bugs.
    """
    if isinstance(error, RevnetError | OSError | MemoryError) or _machine_failure(error) is not None:
        return True
    if isinstance(error, ModuleNotFoundError):
        return _package(error.name) not in ("", "revnet")
    return isinstance(error, ValueError | TypeError | NotImplementedError) and _is_raised_in_revnet(error)


def describe_error(error: BaseException) -> str:
    """Return `error` as one line for the user."""
    if isinstance(error, ModuleNotFoundError):
        package = _package(error.name)
        return f"{package} is not installed; run `{install_command(package)}`."
    if (failure := _machine_failure(error)) is not None:
        return failure
    if isinstance(error, OSError) and error.strerror and not isinstance(error, RevnetError):
        return f"{error.strerror}: `{error.filename}`" if error.filename else error.strerror
    text = one_line(str(error))
    if len(text) > _LONGEST:  # a value from a file, for instance; the way out is at the end
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return text


@contextmanager
def step_errors() -> Iterator[None]:
    """Report in one line what goes wrong while a step runs: memory runs out, or the user's own code fails."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RevnetError) or (isinstance(error, ValueError) and is_expected(error)):
            raise
        from revnet.memory.step._predict import input_hint

        raise UsageError(f"the step failed: {type(error).__name__}: {error}{input_hint(error)}") from error


def one_line(text: str) -> str:
    """Return `text` without line breaks and runs of spaces."""
    return " ".join(text.split())


def _machine_failure(error: BaseException) -> str | None:
    """Return what the machine or an installed package lacks, in one line; None if `error` has another cause."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" and _package(type(error).__module__) == "torch":
        return "the GPU is out of memory; use smaller batches, or `--device cpu`."
    is_allocation = isinstance(error, RuntimeError) and "can't allocate memory" in text
    if isinstance(error, MemoryError) or is_allocation:
        return "the machine is out of memory; free some, or use smaller batches."
    if is_foreign_torchvision(error):
        return str(MissingDependencyError.of_torchvision())
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return "a process that loads data was killed, often due to a lack of memory; pass `--num-workers 0`."
    return None


def _is_raised_in_revnet(error: BaseException) -> bool:
    remote = getattr(error.__cause__, "package", None)
    if remote is not None:  # the exception comes from a process that revnet has started
        return bool(remote == "revnet")
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and _package(frames[-1].f_globals.get("__name__")) == "revnet"


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]
