"""Callbacks that Lightning lacks: the last update, step timing, a log that survives a stop, files written atomically.

They all keep their state in the checkpoint, so a resumed run ends as if it had never stopped.
"""

import math
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from revnet._atomic_file import write_table
from revnet._memory_readings import process_peak_bytes
from revnet.training.processes.statistics import share_statistics
from revnet.training.processes.world import current_world
from revnet.training.run import run_dir
from revnet.training.run.checkpoint import save_weights
from revnet.training.run.task import AbstractTask, BestEpoch

Row = dict[str, float]
"""Figures of one epoch."""

_LOGGED = (
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "drift",
    "drift_amplification",
    "keyframes",
    "step_seconds",
    "samples_per_second",
    "epoch_seconds",
)
_VALIDATED = ("val_loss", "val_accuracy")


class MainStatistics(Callback):
    """Validate with the running statistics of the main process, which are the ones that are saved."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy them to all processes."""
        share_statistics(pl_module)


class LastUpdate(Callback):
    """Stop after `num_updates`, mid-epoch if necessary; that epoch is still validated and saved."""

    # Lightning's `max_steps` would skip the validation.

    def __init__(self, num_updates: int) -> None:
        self._num_updates = num_updates

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the trainer after the last update."""
        if trainer.global_step >= self._num_updates:
            trainer.should_stop = True


class StepTimer(Callback):
    """Log the median time of an update in each epoch, the throughput, and the time of the epoch.

    `step_seconds` includes loading and augmentation, but not validations; `epoch_seconds` includes them.

    The clock is read when an update starts, without waiting for the device. A GPU works asynchronously, but the
    intervals still settle at its pace.

    Args:
        batch_size: Samples per update, over all processes.
        num_warmup: Updates at the start of the process to leave out, in which memory is allocated and kernels are
            chosen.
    """

    def __init__(self, batch_size: int, num_warmup: int = 5) -> None:
        self._batch_size = batch_size
        self._num_warmup = num_warmup
        self._starts: list[float] = []
        self._earlier: list[float] = []  # times of this epoch in the processes before this one
        self._epoch_start = 0.0
        self._pause_start = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the times of this epoch."""
        seconds = torch.tensor([*self._earlier, *self._counted()], dtype=torch.float64)
        return {"seconds": seconds, "epoch_seconds": time.perf_counter() - self._epoch_start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the times of this epoch."""
        self._earlier = state_dict["seconds"].tolist()
        self._epoch_start = time.perf_counter() - state_dict["epoch_seconds"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the times of the last epoch."""
        self._starts.clear()
        self._earlier.clear()
        self._epoch_start = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Read the clock at the first batch of each update."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._starts.append(time.perf_counter())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close the last interval of the epoch."""
        if batch_idx + 1 == trainer.num_training_batches or trainer.should_stop:
            if pl_module.device.type != "cpu":
                torch.accelerator.synchronize(pl_module.device)
            self._starts.append(time.perf_counter())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the updates."""
        self._pause_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the updates again."""
        pause = time.perf_counter() - self._pause_start
        self._starts = [start + pause for start in self._starts]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the median."""
        seconds = [*self._earlier, *self._counted()]
        if not seconds:  # the only update since the last checkpoint, after whose validation the run ends
            seconds = [time.perf_counter() - (self._starts or [self._epoch_start])[-1]]
        step_seconds = median(seconds)
        pl_module.log("step_seconds", step_seconds)
        pl_module.log("samples_per_second", self._batch_size / step_seconds)
        pl_module.log("epoch_seconds", time.perf_counter() - self._epoch_start)
        self._num_warmup = max(0, self._num_warmup - (len(self._starts) - 1))

    def _counted(self) -> list[float]:
        seconds = [end - start for start, end in pairwise(self._starts)]
        return seconds[self._num_warmup :] or (seconds if not self._earlier else [])


class EpochLog(Callback):
    """Collect one row of figures per epoch and write them as CSV.

    Lightning's CSVLogger starts an empty file when a run is resumed. Here the rows are part of the checkpoint, so the
    file has exactly one row for every epoch that led to it.

    Args:
        path: The CSV file.

    Raises:
        ValueError: At the end of an epoch, its training loss is not finite; nothing of that epoch is saved.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lr = 0.0
        self._validated: Row = {}
        self.rows: list[Row] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the rows and, of this epoch, the first learning rate and the figures of the last validation."""
        return {"rows": self.rows, "lr": self._lr, "validation": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows and the figures of the epoch."""
        self.rows = state_dict["rows"]
        self._lr = state_dict["lr"]
        self._validated = state_dict["validation"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the learning rate before the schedule changes it."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]
        self._validated = {}
        # Lightning would show them again for an epoch without a validation.
        for name in _VALIDATED:
            trainer.callback_metrics.pop(name, None)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the figures, which a checkpoint of Lightning lacks."""
        metrics = trainer.callback_metrics
        self._validated = {name: float(metrics[name]) for name in _VALIDATED if name in metrics}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a row and rewrite the file."""
        metrics = trainer.callback_metrics
        row: Row = {"epoch": trainer.current_epoch + 1, "updates": trainer.global_step, "lr": self._lr}
        known = self._validated | {name: float(metrics[name]) for name in _LOGGED if name in metrics}
        row |= {name: known[name] for name in _LOGGED if name in known}
        check_loss(row["train_loss"], self._lr, trainer.current_epoch + 1)
        peak_bytes = process_peak_bytes(trainer.strategy.root_device)
        if peak_bytes is not None:
            row["peak_bytes"] = peak_bytes
        self.rows.append(row)
        if not current_world().is_main:
            return
        # An epoch may lack a figure: it may be too short for a measurement of drift, for instance.
        names = dict.fromkeys(name for earlier_row in self.rows for name in earlier_row)
        write_table(self._path, list(names), self.rows)


def check_loss(loss: float, lr: float, epoch: int) -> None:
    """Raise unless the training loss of an epoch is finite.

    Raises:
        ValueError: It is not.
    """
    if not math.isfinite(loss):
        raise ValueError(f"`lr` (={lr:g}) made the training loss {loss} in epoch {epoch}; pass a smaller one.")


class RunFiles(Checkpoint):
    """Write the best weights after a validation, and the last weights after every epoch.

    The task's rule decides which validation is the best, such as the one with the highest accuracy; of equal ones, the
    one with the lowest loss, and of these, the latest. Without validation, the last epoch is the best.

    Args:
        folder: Folder for `best.safetensors` and `last.safetensors`.
        rule: Rule for which epoch is the best.
    """

    # Lightning runs a `Checkpoint` after all other callbacks, and the ones that it was passed in that order.

    def __init__(self, folder: Path, rule: BestEpoch) -> None:
        self._folder = folder
        self._rule = rule
        self.best_epoch = 0
        self.best_score: float | None = None
        self._best_loss: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the best epoch so far."""
        scores = {"best_val_loss": self._best_loss, f"best_{self._rule.metric}": self.best_score}
        return {"best_epoch": self.best_epoch, **scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best epoch so far."""
        self.best_epoch = state_dict["best_epoch"]
        self.best_score = state_dict[f"best_{self._rule.metric}"]
        self._best_loss = state_dict.get("best_val_loss")  # older checkpoints of classifiers lack it

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files, before a checkpoint refers to them."""
        assert isinstance(pl_module, AbstractTask)
        if self.best_score is None:  # no validation so far
            self._save_best(trainer, pl_module)
        with pl_module.with_final_weights():
            save_weights(pl_module.saved_module, self._folder / run_dir.LAST_WEIGHTS, epoch=trainer.current_epoch + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the weights if this validation is the best so far."""
        assert isinstance(pl_module, AbstractTask)
        # A run that diverges may still have an accuracy.
        if math.isfinite(trainer.callback_metrics["val_loss"]) and self._is_best(trainer):
            self._save_best(trainer, pl_module)

    def _is_best(self, trainer: Trainer) -> bool:
        score, loss = (float(trainer.callback_metrics[name]) for name in (self._rule.metric, "val_loss"))
        if self.best_score is not None:
            best_loss = math.inf if self._best_loss is None else self._best_loss
            if not self._rule.is_best(score, loss, earlier_score=self.best_score, earlier_loss=best_loss):
                return False
        self.best_score, self._best_loss = score, loss
        return True

    def _save_best(self, trainer: Trainer, pl_module: AbstractTask) -> None:
        self.best_epoch = trainer.current_epoch + 1
        with pl_module.with_final_weights():
            save_weights(pl_module.saved_module, self._folder / run_dir.BEST_WEIGHTS, epoch=self.best_epoch)
