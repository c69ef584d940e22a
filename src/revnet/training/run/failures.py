"""What stops a run from outside, in one line: no memory, no room on the disk, a killed process that loads data."""

import errno
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from revnet.errors import CheckpointError, ProcessError, RevnetError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_TIMEOUT = re.compile(r"DataLoader timed out after (\d+)")
_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (is killed by signal: ([^.]+)|exited unexpectedly)")


def explain(error: Exception, folder: Path) -> RevnetError | None:
    """Return an error of one line if the machine caused `error`; None if it has another cause."""
    if isinstance(error, RevnetError):
        return None
    resume = f"`revnet train --resume {folder}` continues"
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return ProcessError(f"the GPU is out of memory; {resume}, with `--memory-budget` to need less.")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        return ProcessError(f"the machine is out of memory; free some, and {resume}.")
    # The signal of a killed process may come while a checkpoint is written, and then the writer fails too.
    worker = next(filter(None, map(_WORKER.search, _texts(error))), None)
    if worker or _lost_worker(error):
        reason = f" by {worker[2]}" if worker and worker[2] else ""
        return ProcessError(
            f"a process that loads data was killed{reason}, which is often due to a lack of memory; {resume}, with "
            "fewer `--num-workers` to need less, and a container may need more `--shm-size`."
        )
    if timeout := _TIMEOUT.search(text):
        return ProcessError(
            f"a process that loads data has sent nothing for {timeout[1]} seconds; {resume}, with `--num-workers 0`, "
            "and a container may need more `--shm-size`."
        )
    if isinstance(error, OSError):
        return _explain_os_error(error, folder, resume)
    return None


def _lost_worker(error: Exception) -> bool:
    """Whether a process that loads data ended while it handed over the memory of a batch."""
    if not isinstance(error, EOFError | ConnectionError):
        return False
    files = (frame.filename for frame in traceback.extract_tb(error.__traceback__))
    return any(file.endswith("torch/utils/data/dataloader.py") for file in files)


def _texts(error: BaseException) -> Iterator[str]:
    """Yield the message of an error, and the messages of the errors during whose handling it was raised."""
    current: BaseException | None = error
    while current is not None:
        yield str(current)
        current = current.__cause__ or current.__context__


def _explain_os_error(error: OSError, folder: Path, resume: str) -> RevnetError | None:
    path = None if error.filename is None else Path(error.filename)
    is_ours = error.errno in _DISK_ERRORS if path is None else path.resolve().is_relative_to(folder.resolve())
    if not is_ours:
        return None
    if not folder.is_dir():
        return CheckpointError(f"`{folder}` was deleted while the run was going on; nothing of it is left.")
    return CheckpointError(f"`{path or folder}` cannot be written: {error.strerror}; make room, and {resume}.")
