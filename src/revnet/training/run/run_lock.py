"""The lock that keeps a second process away from the folder of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from revnet.errors import CheckpointError
from revnet.training.processes.world import current_world
from revnet.training.run import run_dir

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NAME = "lock"


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold the lock of the run in `folder` while the body runs; of several processes, the main one does.

    The operating system releases the lock when the process ends, in any way. A file system without locks gives none.

    Args:
        folder: Folder of the run.

    Raises:
        CheckpointError: Another process works on the run, or the file of the lock cannot be opened.
    """
    if fcntl is None or not current_world().is_main:
        yield
        return
    with _open(folder / run_dir.CHECKPOINTS / _NAME) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"`{folder}` belongs to a run that is still going on; wait for its end, or stop it."
            ) from error
        except OSError:
            pass
        yield


def _open(path: Path) -> TextIO:
    try:
        return path.open("a")
    except OSError as error:
        way_out = "remove it" if path.exists() else "make its folder writable"
        raise CheckpointError(f"`{path}` cannot be opened: {error.strerror}; {way_out}.") from error
