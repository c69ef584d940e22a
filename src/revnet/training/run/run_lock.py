"""The lock that keeps a second process away from the folder of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        CheckpointError: Another process works on the run.
    """
    if fcntl is None or not current_world().is_main:
        yield
        return
    with (folder / run_dir.CHECKPOINTS / _NAME).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"`{folder}` belongs to a run that is still going on; wait for its end, or stop it."
            ) from error
        except OSError:
            pass
        yield
