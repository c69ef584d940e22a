"""Callbacks that Lightning lacks: exact resumption, step timing, a log that survives it, files written atomically.

They all keep their state in the checkpoint, so a resumed run ends as if it had never stopped.
"""

import csv
import math
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from revnet.nn import ReversibleSequential
from revnet.training.atomic_file import atomic_path
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
    "epoch_seconds",
)


class RandomState(Callback):
    """Keep PyTorch's random state, on the CPU and on the device in use, in the checkpoint.

    A resumed run continues augmentation and dropout where they stopped. The order of the images needs no state: it is a
    function of the seed and the epoch.
    """

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._restored: dict[str, Tensor | None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the device."""
        self._device = trainer.strategy.root_device

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return the state of the generators."""
        # Tensors only: checkpoints are read with `weights_only`.
        on_cuda = self._device.type == "cuda"
        return {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self._device) if on_cuda else None,
        }

    def load_state_dict(self, state_dict: dict[str, Tensor | None]) -> None:
        """Remember the state until training starts, since setting up draws random numbers too."""
        self._restored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the generators."""
        if self._restored is None:
            return
        cpu, cuda = self._restored["cpu"], self._restored["cuda"]
        assert cpu is not None
        torch.set_rng_state(cpu.cpu())
        if cuda is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(cuda.cpu(), self._device)
        self._restored = None


class ToleranceState(Callback):
    """Keep the keyframes of reversible sequences with a tolerance in the checkpoint.

    The positions of the keyframes decide the last digits of the gradients.
    """

    def __init__(self) -> None:
        self._sequences: dict[str, ReversibleSequential] = {}
        self._restored: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the sequences."""
        modules = pl_module.named_modules()
        self._sequences = {name: module for name, module in modules if isinstance(module, ReversibleSequential)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each sequence."""
        return {name: sequence.tolerance_state() for name, sequence in self._sequences.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the state until training starts."""
        self._restored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the state of each sequence."""
        for name, sequence in self._sequences.items():
            sequence.restore_tolerance(self._restored.get(name))


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
    """Log the median time of an update in each epoch and the time of the epoch.

    `step_seconds` includes loading and augmentation, `epoch_seconds` includes validation.

    The clock is read when an update starts, without waiting for the device. A GPU works asynchronously, but the
    intervals still settle at its pace.

    Args:
        num_warmup: Updates at the start of the process to leave out, in which memory is allocated and kernels are
            chosen.
    """

    def __init__(self, num_warmup: int = 5) -> None:
        self._num_warmup = num_warmup
        self._starts: list[float] = []
        self._epoch_start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the times of the last epoch."""
        self._starts.clear()
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
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            self._starts.append(time.perf_counter())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the median."""
        seconds = [end - start for start, end in pairwise(self._starts)]
        counted = seconds[self._num_warmup :] or seconds
        self._num_warmup = max(0, self._num_warmup - len(seconds))
        pl_module.log("step_seconds", median(counted))
        pl_module.log("epoch_seconds", time.perf_counter() - self._epoch_start)


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
        self.rows: list[Row] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the rows."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows."""
        self.rows = state_dict["rows"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the learning rate before the schedule changes it."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a row and rewrite the file."""
        metrics = trainer.callback_metrics
        row: Row = {"epoch": trainer.current_epoch + 1, "updates": trainer.global_step, "lr": self._lr}
        row |= {name: float(metrics[name]) for name in _LOGGED if name in metrics}
        if not math.isfinite(row["train_loss"]):
            raise ValueError(
                f"`lr` (={self._lr:g}) made the training loss {row['train_loss']} in epoch {row['epoch']}; pass a "
                "smaller one."
            )
        self.rows.append(row)
        with atomic_path(self._path) as temporary, temporary.open("w", newline="") as file:
            # An epoch may lack a figure: it may be too short for a measurement of drift, for instance.
            names = dict.fromkeys(name for earlier_row in self.rows for name in earlier_row)
            writer = csv.DictWriter(file, fieldnames=names)
            writer.writeheader()
            writer.writerows(self.rows)


class RunFiles(Checkpoint):
    """Write the best weights after a validation, and the last weights and the checkpoint after every epoch.

    The task's rule decides which validation is the best, such as the one with the highest accuracy; the earliest of
    equal ones wins. Without validation, the last epoch is the best.

    Args:
        folder: Folder for `best.safetensors`, `last.safetensors` and `last.ckpt`.
        rule: Rule for which epoch is the best.
    """

    # Lightning runs a `Checkpoint` after all other callbacks, so the file holds their state after this epoch.

    def __init__(self, folder: Path, rule: BestEpoch) -> None:
        self._folder = folder
        self._rule = rule
        self.best_epoch = 0
        self.best_score: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the best epoch so far."""
        return {"best_epoch": self.best_epoch, f"best_{self._rule.metric}": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best epoch so far."""
        self.best_epoch = state_dict["best_epoch"]
        self.best_score = state_dict[f"best_{self._rule.metric}"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files, the checkpoint last: it must not refer to weights that were not written."""
        assert isinstance(pl_module, AbstractTask)
        if self._rule.metric not in trainer.callback_metrics:
            self._save_best(trainer, pl_module)
        with pl_module.with_final_weights():
            save_weights(pl_module.saved_module, self._folder / run_dir.LAST_WEIGHTS)
        trainer.save_checkpoint(self._folder / run_dir.CHECKPOINT)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the weights if this validation is the best so far."""
        assert isinstance(pl_module, AbstractTask)
        score = float(trainer.callback_metrics[self._rule.metric])
        if not math.isfinite(trainer.callback_metrics["val_loss"]):
            return  # a run that diverges may still have an accuracy
        if self.best_score is None or self._rule.is_better(score, self.best_score):
            self.best_score = score
            self._save_best(trainer, pl_module)

    def _save_best(self, trainer: Trainer, pl_module: AbstractTask) -> None:
        self.best_epoch = trainer.current_epoch + 1
        with pl_module.with_final_weights():
            save_weights(pl_module.saved_module, self._folder / run_dir.BEST_WEIGHTS)
