"""Progress of a run: a bar on a terminal, a line per epoch anywhere else."""

import os
import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from revnet.training.run.task import AbstractTask


def make_progress() -> Callback:
    """Return the callback that suits the output."""
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")
    return RunBar() if is_terminal else EpochLines()


class EpochLines(Callback):
    """Print a line at the end of each epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        seconds = float(trainer.callback_metrics["epoch_seconds"])
        print(f"{_epoch(trainer)}  {_figures(trainer)}  {seconds:.1f} s", flush=True)


class RunBar(Callback):
    """Show one bar for the whole run, with the figures of the last finished epoch.

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
            TextColumn("{task.fields[figures]}"),
            refresh_per_second=4,
        )
        self._progress.add_task(_epoch(trainer), total=pl_module.num_updates, completed=trainer.global_step, figures="")
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
        """Show the figures of the epoch."""
        self._update(figures=_figures(trainer))

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


def _figures(trainer: Trainer) -> str:
    assert isinstance(trainer.lightning_module, AbstractTask)
    return trainer.lightning_module.report({name: float(value) for name, value in trainer.callback_metrics.items()})
