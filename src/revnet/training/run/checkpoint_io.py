"""Lightning's plugins that write and read checkpoints: whole or not at all, at once or in the background."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from revnet._atomic_file import atomic_path
from revnet.training.run.checkpoint import read_checkpoint
from revnet.training.run.checkpoint_folder import delete_checkpoint
from revnet.training.run.plain_state import without_foreign_states
from revnet.training.run.state_digest import DIGEST_KEY, digest_state


class AtomicCheckpointIO(CheckpointIO):
    """Plugin that writes a checkpoint whole or not at all.

    An error of the disk is kept until `take_error`, since the other processes of a run wait for the one that writes.

    Args:
        is_async: Whether to write in the background. Then the next checkpoint waits for the one before it. Lightning's
            `AsyncCheckpointIO` does not wait, and copies tensors within the GPU.
    """

    def __init__(self, *, is_async: bool = False) -> None:
        self._is_async = is_async
        self._executor: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._error: OSError | None = None
        self._warned: set[str] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint`; if the process is killed while writing, the previous file remains."""
        self.wait()
        if self._error is not None:
            return
        checkpoint = without_foreign_states(checkpoint, self._warned)
        if not self._is_async:
            self._write(checkpoint, Path(path))
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        snapshot = apply_to_collection(checkpoint, Tensor, _copy_to_cpu)
        self._pending = self._executor.submit(self._write, snapshot, Path(path))

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def take_error(self) -> OSError | None:
        """Return the error of an earlier `save_checkpoint`, if there was one, once."""
        error, self._error = self._error, None
        return error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint without executing anything in it."""
        return read_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint."""
        delete_checkpoint(Path(path))

    def teardown(self) -> None:
        """Finish writing."""
        self.wait()
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint | {DIGEST_KEY: digest_state(checkpoint)}, file)
                if path.is_dir():  # shards of a run that was continued from an earlier checkpoint
                    delete_checkpoint(path)
        except OSError as error:
            self._error = error
        except RuntimeError as error:  # PyTorch's writer hides what the file raised
            if not isinstance(error.__context__, OSError):
                raise
            self._error = error.__context__


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu() if tensor.device.type != "cpu" else tensor.detach().clone()
