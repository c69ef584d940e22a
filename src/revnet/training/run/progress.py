"""Progress of a run: a line per epoch, above a bar on a terminal, and with a line every minute anywhere else."""

import math
import os
import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from revnet._units import format_seconds
from revnet.training.run.task import AbstractTask


def make_progress() -> Callback:
    """Return the callback that suits the output."""
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")
    return RunBar() if is_terminal else EpochLines()


class EpochLines(Callback):
    """Print a line at the end of each epoch, and one every minute within a long epoch.

    Args:
        interval_seconds: Time after which a line is due.
    """

    def __init__(self, interval_seconds: float = 60.0) -> None:
        self._interval_seconds = interval_seconds
        self._last_seconds = 0.0  # time of the last line
        self._num_batches = 0  # training batches since then

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._restart()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line if one is due."""
        self._num_batches += 1
        seconds = time.perf_counter() - self._last_seconds
        if seconds < self._interval_seconds:
            return
        assert isinstance(pl_module, AbstractTask)
        step_seconds = seconds / self._num_batches * trainer.accumulate_grad_batches
        figures = pl_module.report({"train_loss": pl_module.mean_train_loss, "step_seconds": step_seconds})
        self._print(f"{_epoch(trainer)}  batch {_position(batch_idx, trainer.num_training_batches)}  {figures}")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print a line if one is due."""
        if time.perf_counter() - self._last_seconds >= self._interval_seconds:
            self._print(f"{_epoch(trainer)}  validation batch {_position(batch_idx, trainer.num_val_batches[0])}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the epoch."""
        self._print(_epoch_line(trainer))

    def _print(self, line: str) -> None:
        print(line, flush=True)
        self._restart()

    def _restart(self) -> None:
        self._last_seconds, self._num_batches = time.perf_counter(), 0


class RunBar(Callback):
    """Show one bar for the whole run, below a line for each finished epoch.

    Lightning's own bars start again with every epoch and every validation.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the bar, at the position of the resumed run if there is one."""
        assert isinstance(pl_module, AbstractTask)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            refresh_per_second=4,
        )
        self._progress.add_task(_epoch(trainer), total=pl_module.num_updates, completed=trainer.global_step)
        self._progress.start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the number of the epoch."""
        self._update(description=_epoch(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance by one update."""
        self._update(completed=trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the epoch above the bar."""
        assert self._progress is not None
        self._progress.console.print(_epoch_line(trainer), markup=False, highlight=False, soft_wrap=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the full bar on the screen."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the terminal and its cursor."""
        self._stop()

    def _update(self, **changes: Any) -> None:
        assert self._progress is not None
        self._progress.update(self._progress.task_ids[0], **changes)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _epoch(trainer: Trainer) -> str:
    width = len(str(trainer.max_epochs))
    return f"epoch {trainer.current_epoch + 1:>{width}}/{trainer.max_epochs}"


def _epoch_line(trainer: Trainer) -> str:
    assert isinstance(trainer.lightning_module, AbstractTask)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    seconds = format_seconds(metrics["epoch_seconds"])
    return f"{_epoch(trainer)}  {trainer.lightning_module.report(metrics)}  {seconds}"


def _position(index: int, count: float) -> str:
    """Return the number of a batch, and of how many if that is known: a stream has infinitely many."""
    return f"{index + 1:,}" if math.isinf(count) else f"{index + 1:,}/{count:,}"
