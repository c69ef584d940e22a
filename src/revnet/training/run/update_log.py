"""The log by update: a CSV file, and the loggers of the trainer."""

import csv
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from revnet._atomic_file import write_csv
from revnet._input_files import read_text
from revnet._memory_readings import process_peak_bytes
from revnet.errors import CheckpointError
from revnet.training.drift_monitor import DriftMonitor

_COLUMNS = ("update", "epoch", "train_loss_step", "lr", "samples_per_second", "peak_bytes", "drift")
_MOST_BYTES = 2**30
_MOST_DIGITS = 19
"""Digits that a number of updates may have."""


class UpdateLog(Callback):
    """Log loss, learning rate, throughput, peak memory and drift every `every` updates.

    The loss is the mean over the updates since the last row, over all processes. The time of validations does not
    count. A resumed run removes the rows after its checkpoint.

    Args:
        path: The CSV file.
        every: Updates from one row to the next.
        batch_size: Samples per update, over all processes.
    """

    def __init__(self, path: Path, *, every: int, batch_size: int) -> None:
        self._path = path
        self._every = every
        self._batch_size = batch_size
        self._last_update = 0
        self._loss_sum: Tensor | None = None
        self._lr = 0.0
        self._drift: float | None = None
        self._monitor: DriftMonitor | None = None
        self._timed_from = 0
        self._start = 0.0
        self._pause_start = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the figures since the last row."""
        loss_sum = None if self._loss_sum is None else self._loss_sum.cpu()
        return {"last_update": self._last_update, "loss_sum": loss_sum, "drift": self._drift}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the figures since the last row."""
        self._last_update = state_dict["last_update"]
        self._loss_sum = state_dict["loss_sum"]
        self._drift = state_dict["drift"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the rows after the checkpoint, and start the clock."""
        if self._loss_sum is not None:
            self._loss_sum = self._loss_sum.to(pl_module.device)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set in Lightning's constructor
        self._monitor = next((callback for callback in callbacks if isinstance(callback, DriftMonitor)), None)
        self._timed_from = trainer.global_step
        self._start = time.perf_counter()
        if trainer.is_global_zero:
            _start_file(self._path, trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the learning rate before the schedule changes it."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the loss and, when it is time, write a row."""
        loss = (outputs["loss"] if isinstance(outputs, Mapping) else outputs).detach()
        # Lightning has divided the loss by the number of parts of a batch, if gradients are accumulated.
        self._loss_sum = loss.clone() if self._loss_sum is None else self._loss_sum + loss
        update = trainer.global_step
        if self._monitor is not None and (measured := self._monitor.measured.get(update - 1)) is not None:
            self._drift = measured.error
        if update % self._every or update == self._last_update:
            return
        self._write(trainer, pl_module, update)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._pause_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        self._start += time.perf_counter() - self._pause_start

    def _write(self, trainer: Trainer, pl_module: LightningModule, update: int) -> None:
        assert self._loss_sum is not None
        mean_loss = trainer.strategy.reduce(self._loss_sum / (update - self._last_update), reduce_op="mean")
        now = time.perf_counter()
        row: dict[str, float] = {
            "update": update,
            "epoch": trainer.current_epoch + 1,
            "train_loss_step": float(mean_loss),
            "lr": self._lr,
            "samples_per_second": self._batch_size * (update - self._timed_from) / (now - self._start),
        }
        peak_bytes = process_peak_bytes(trainer.strategy.root_device)
        if peak_bytes is not None:
            row["peak_bytes"] = peak_bytes
        if self._drift is not None:
            row["drift"] = self._drift
        self._last_update, self._timed_from, self._start = update, update, now
        self._loss_sum = self._drift = None
        if trainer.is_global_zero:
            with self._path.open("a", newline="") as file:
                csv.DictWriter(file, _COLUMNS).writerow(row)
        figures = {name: value for name, value in row.items() if name not in ("update", "drift")}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=update)


def _start_file(path: Path, update: int) -> None:
    """Write the head of the file and, of the rows that it has, those up to `update`."""
    rows = _read_rows(path) if path.is_file() else []
    write_csv(path, [_COLUMNS, *(row for row in rows if int(row[0]) <= update)])


def _read_rows(path: Path) -> list[list[str]]:
    """Return the rows of the file that are whole; a process that was killed may have written half of one."""
    try:
        lines = read_text(path, _MOST_BYTES).splitlines()
        rows = list(csv.reader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CheckpointError(f"`{path}` is damaged: {error}; restore the file, or delete it.") from error
    return [row for row in rows if len(row) == len(_COLUMNS) and row[0].isdecimal() and len(row[0]) < _MOST_DIGITS]
