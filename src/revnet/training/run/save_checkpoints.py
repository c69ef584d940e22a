"""The callback that decides when a run saves a checkpoint, and when it stops."""

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException

from revnet._units import counted
from revnet.errors import CheckpointError
from revnet.training.run.agreement import Agreement
from revnet.training.run.callbacks import check_loss
from revnet.training.run.checkpoint_folder import CheckpointFolder, update_of
from revnet.training.run.checkpoint_io import AtomicCheckpointIO
from revnet.training.run.stop_signals import SavedAndStopped, StopSignals
from revnet.training.run.task import AbstractTask
from revnet.training.settings.run_config import AbstractRunConfig
from revnet.training.settings.save_interval import SaveInterval

_SAVE = 1
_STOP = 2  # plus the number of the signal


@dataclass(frozen=True)
class RunEnd:
    """End of a run, as its last checkpoint states it."""

    num_updates: int | None = None
    """Number of updates that the whole run was to have; None as long as the run is not over."""
    is_within_epoch: bool = False
    """Whether the last epoch was cut short."""


class SaveCheckpoints(Checkpoint):
    """Save a checkpoint at an interval, at the end of each epoch, and before a stop by Ctrl-C or SIGTERM.

    All processes save after the same update. Where a validation follows an update, the checkpoint comes after the
    validation; a stop during a validation saves at once, and the resumed run repeats that validation.

    Args:
        folder: Folder of the checkpoints.
        interval: Distance between two checkpoints within an epoch.
        num_kept: Number of checkpoints to keep.
        signals: Handler of Ctrl-C and SIGTERM.

    Raises:
        CheckpointError: A checkpoint could not be written; the ones before it remain.
        SavedAndStopped: Ctrl-C or SIGTERM came, to any of the processes.
    """

    # Lightning runs a `Checkpoint` after all other callbacks, so the file holds their state after this update.

    def __init__(self, folder: CheckpointFolder, interval: SaveInterval, num_kept: int, signals: StopSignals) -> None:
        self._folder = folder
        self._interval = interval
        self._num_kept = num_kept
        self._signals = signals
        self._agreement = Agreement()
        self._last_time = 0.0
        self._is_due = False
        self._repeats_validation = False
        self._end = RunEnd()

    def state_dict(self) -> dict[str, Any]:
        """Return whether the run was over, and how."""
        return asdict(self._end)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore whether the run was over."""
        self._end = RunEnd(**state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and take the signals from Lightning."""
        assert isinstance(pl_module, AbstractTask)
        if self._end.num_updates == pl_module.num_updates:
            trainer.should_stop = True  # it was over, and its length is still the same
        self._end = RunEnd()
        self._signals.install()
        self._signals.waits = True
        self._last_time = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, and stop if a signal has come."""
        answer = self._agreement.ask(self._request())
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            self._is_due |= answer > 0
            return
        updates = self._interval.updates
        self._is_due |= answer > 0 or (updates is not None and trainer.global_step % updates == 0)
        is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or trainer.should_stop
        if is_last or _validation_follows(trainer, batch_idx):
            return  # the end of the epoch, or of the validation, saves and stops
        if self._is_due:
            self._save_within_epoch(trainer, pl_module)
        self._stop(trainer, answer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save and stop if a signal has come."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        answer = self._agreement.ask(self._request() if self._signals.number is not None else 0)
        if answer >= _STOP:
            self._repeats_validation = True
            self._save_within_epoch(trainer, pl_module)
        self._stop(trainer, answer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if it was time before the validation."""
        is_within_epoch = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and not trainer.should_stop
        if self._is_due and is_within_epoch and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_within_epoch(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and stop if a signal has come."""
        assert isinstance(pl_module, AbstractTask)
        answer = self._agreement.ask_now(self._request())
        if trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs:
            progress = trainer.fit_loop.epoch_loop.batch_progress
            self._end = RunEnd(pl_module.num_updates, is_within_epoch=not progress.is_last_batch)
        self._save(trainer)
        self._stop(trainer, answer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish writing."""
        self._signals.waits = False
        self._finish(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint within a validation start with that validation."""
        if self._repeats_validation:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            num_completed = progress["total"]["completed"]
            # Lightning's own mark of a checkpoint within a validation: one batch was started and not processed.
            started = {"ready": num_completed + 1, "started": num_completed + 1}
            progress["total"] |= started | {"processed": num_completed, "completed": num_completed}
            progress["current"] = dict.fromkeys(progress["current"], 0)
            progress["is_last_batch"] = False

    def _request(self) -> int:
        if self._signals.number is not None:
            return _STOP + self._signals.number
        seconds = self._interval.seconds
        return _SAVE if seconds is not None and time.monotonic() - self._last_time >= seconds else 0

    def _save_within_epoch(self, trainer: Trainer, task: LightningModule) -> None:
        """Save, unless the loss shows that the run has diverged: the checkpoints before that must remain."""
        assert isinstance(task, AbstractTask)
        if self._agreement.any(not math.isfinite(task.total_train_loss)):
            check_loss(math.nan, trainer.optimizers[0].param_groups[0]["lr"], trainer.current_epoch + 1)
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        update = trainer.global_step
        if isinstance(trainer.strategy, ModelParallelStrategy):
            self._save_shards(trainer, update)
        else:
            trainer.save_checkpoint(self._folder.file(update))
        self._check(trainer)
        self._last_time = time.monotonic()
        self._is_due = False
        if trainer.is_global_zero:
            self._folder.prune(self._num_kept)

    def _save_shards(self, trainer: Trainer, update: int) -> None:
        path = self._folder.temporary(update)
        try:
            trainer.save_checkpoint(path)
        except (CheckpointException, RuntimeError, OSError) as error:
            # Of the shards, all processes learn that one of them failed. The rest is written by the main process alone.
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            if trainer.is_global_zero:
                shutil.rmtree(path, ignore_errors=True)
            reason = _reason(cause)
            if reason is None:
                raise
            raise self._failure(reason) from error
        if trainer.is_global_zero:
            self._folder.complete(update)

    def _stop(self, trainer: Trainer, answer: int) -> None:
        if answer >= _STOP:
            self._finish(trainer)
            trainer.strategy.barrier("stop")
            raise SavedAndStopped(answer - _STOP)

    def _finish(self, trainer: Trainer) -> None:
        """Wait for a checkpoint that is written in the background."""
        io = trainer.strategy.checkpoint_io
        if isinstance(io, AtomicCheckpointIO):
            io.wait()
        self._check(trainer)
        if trainer.is_global_zero:
            self._folder.prune(self._num_kept)

    def _check(self, trainer: Trainer) -> None:
        """Raise in all processes if the one that writes could not."""
        io = trainer.strategy.checkpoint_io
        error = io.take_error() if isinstance(io, AtomicCheckpointIO) else None
        reason = trainer.strategy.broadcast(None if error is None else error.strerror or str(error))
        if reason is not None:
            raise self._failure(reason)

    def _failure(self, reason: str) -> CheckpointError:
        path = self._folder.path
        if not path.is_dir():
            return CheckpointError(f"`{path}` was deleted while the run was going on; its checkpoints are lost.")
        saved = self._folder.all()
        start = f"update {update_of(saved[-1]):,}" if saved else "the beginning"
        return CheckpointError(
            f"the checkpoints in `{path}` cannot be written: {reason}; make room, and `revnet train --resume "
            f"{path.parent}` continues from {start}."
        )


def _reason(error: BaseException) -> str | None:
    """Return why a shard could not be written; None if the disk was not the cause."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # PyTorch's writer hides the error of the disk, and on the way to this process its cause is lost.
    return "the disk may be full" if "inline_container" in str(error) else None


def _validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    interval = trainer.val_check_batch
    if not trainer.enable_validation or interval is None or math.isinf(interval):
        return False
    index = trainer.fit_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
    return (index + 1) % int(interval) == 0


def check_length(checkpoint: Mapping[str, Any], config: AbstractRunConfig, num_updates: int) -> None:
    """Raise unless a run of `num_updates` can continue from a checkpoint.

    Raises:
        ValueError: The run already has more updates, or its last epoch was cut short.
    """
    num_done = checkpoint["global_step"]
    end = RunEnd(**checkpoint["callbacks"].get(SaveCheckpoints.__qualname__, {}))
    name = "max_updates" if config.max_updates == num_updates else "epochs"  # the one that ends the run
    value = getattr(config, name)
    if num_done > num_updates:
        raise ValueError(
            f"`{name}` (={value}) leaves {counted(num_updates, 'update')}, and the run has made {num_done:,} already; "
            "pass more."
        )
    if end.is_within_epoch and num_updates != end.num_updates:
        raise ValueError(
            f"`{name}` (={value}) cannot continue the run, whose last epoch was cut short at update {num_done:,}; "
            "start a new run."
        )
