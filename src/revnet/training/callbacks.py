"""What Lightning lacks: exact resumption, step timing, a log that survives it, files that are never half-written.

All of them keep what they know in the checkpoint, so a resumed run ends as if it had never stopped.
"""

from __future__ import annotations

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
from revnet.training._checkpoint import save_weights
from revnet.training._files import atomic_path
from revnet.training._task import AbstractTask, Criterion

Row = dict[str, float]

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
    """Keep the random state of PyTorch, on the CPU and on the device in use, in the checkpoint.

    Augmentation and dropout go on where they stopped. The order of the images needs no state: it is a function of the
    seed and the epoch.
    """

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._restored: dict[str, Tensor | None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the device."""
        self._device = trainer.strategy.root_device

    def state_dict(self) -> dict[str, Tensor | None]:
        """Capture the generators."""
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
        """Put the generators back."""
        if self._restored is None:
            return
        cpu, cuda = self._restored["cpu"], self._restored["cuda"]
        assert cpu is not None
        torch.set_rng_state(cpu.cpu())
        if cuda is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(cuda.cpu(), self._device)
        self._restored = None


class GuardState(Callback):
    """Keep the keyframes of reversible sequences with a tolerance in the checkpoint.

    Where streams are kept decides the last digits of the gradients.
    """

    def __init__(self) -> None:
        self._sequences: dict[str, ReversibleSequential] = {}
        self._restored: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the sequences."""
        modules = pl_module.named_modules()
        self._sequences = {name: module for name, module in modules if isinstance(module, ReversibleSequential)}

    def state_dict(self) -> dict[str, Any]:
        """Give what they have learnt."""
        return {name: sequence.tolerance_state() for name, sequence in self._sequences.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember it until training starts."""
        self._restored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put it back."""
        for name, sequence in self._sequences.items():
            sequence.restore_tolerance(self._restored.get(name))


class LastUpdate(Callback):
    """End the run after `num_updates`, in the midst of an epoch if need be, which is validated and saved like any."""

    # Lightning's `max_steps` would leave out the validation.

    def __init__(self, num_updates: int) -> None:
        self._num_updates = num_updates

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count."""
        if trainer.global_step >= self._num_updates:
            trainer.should_stop = True


class StepTimer(Callback):
    """Log `step_seconds`, the median time of an update within each epoch, loading and augmentation included.

    Beside it `epoch_seconds`, the time of the epoch as a whole, validation included.

    The clock is read when an update starts, and nothing waits for the device: on a GPU, which runs behind, the
    intervals still settle at its pace.

    Args:
        num_warmup: Updates at the start of the process that are not counted: memory is allocated, kernels are chosen.
    """

    def __init__(self, num_warmup: int = 5) -> None:
        self._num_warmup = num_warmup
        self._starts: list[float] = []
        self._epoch_start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last epoch."""
        self._starts.clear()
        self._epoch_start = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Read the clock."""
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
    file tells of every epoch that led to it, once.

    Args:
        path: The CSV file.

    Raises:
        ValueError: At the end of an epoch whose training loss is not finite, before anything of it is saved.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lr = 0.0
        self.rows: list[Row] = []

    def state_dict(self) -> dict[str, Any]:
        """Give the rows to the checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rows back."""
        self.rows = state_dict["rows"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the learning rate before the schedule moves on."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a row and write the file anew."""
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
            # Not every epoch has all of them: one may be too short for a measurement of drift.
            names = dict.fromkeys(name for each in self.rows for name in each)
            writer = csv.DictWriter(file, fieldnames=names)
            writer.writeheader()
            writer.writerows(self.rows)


class RunFiles(Checkpoint):
    """Write, after every epoch, the best and the last weights and the checkpoint to resume from.

    The best epoch is the one that the task's criterion says, such as the highest validation accuracy, the earliest
    among equals; without validation it is the last epoch.

    Args:
        folder: Where `best.safetensors`, `last.safetensors` and `last.ckpt` go.
        criterion: Which epoch is the best.
    """

    # Lightning runs a `Checkpoint` after all other callbacks, so the file holds what they know after this epoch.

    def __init__(self, folder: Path, criterion: Criterion) -> None:
        self._folder = folder
        self._criterion = criterion
        self.best_epoch = 0
        self.best_score: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Give the best so far to the checkpoint."""
        return {"best_epoch": self.best_epoch, f"best_{self._criterion.metric}": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best so far back."""
        self.best_epoch = state_dict["best_epoch"]
        self.best_score = state_dict[f"best_{self._criterion.metric}"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files; the checkpoint comes last, so it never knows of weights that are not there."""
        assert isinstance(pl_module, AbstractTask)
        if self._is_best(trainer):
            self.best_epoch = trainer.current_epoch + 1
            save_weights(pl_module.product, self._folder / "best.safetensors")
        save_weights(pl_module.product, self._folder / "last.safetensors")
        trainer.save_checkpoint(self._folder / "last.ckpt")

    def _is_best(self, trainer: Trainer) -> bool:
        if self._criterion.metric not in trainer.callback_metrics:
            return True
        score = float(trainer.callback_metrics[self._criterion.metric])
        if self.best_score is not None and not self._criterion.is_better(score, self.best_score):
            return False
        self.best_score = score
        return True
