"""Callbacks that record gradients and losses of a training run without changing it."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from revnet.paper.gradient_angle.gradients import GradientError, gradient_errors
from revnet.training.classification.task import Batch, ClassificationTask


class GradientAngle(Callback):
    """Compare rebuilt with stored gradients before the first update, every `every` updates, and before the last one.

    Each measurement uses the weights, batch, augmentation, dropout and precision of the update that follows. It takes
    the time of two to three updates and the memory of the stored twin.

    Args:
        every: Number of updates from one measurement to the next.
        with_reference: Whether to compare stored gradients with float64 too.

    Raises:
        TypeError: `every` is not an integer.
        ValueError: `every` is not positive.
    """

    def __init__(self, every: int, *, with_reference: bool = False) -> None:
        if not isinstance(every, int) or isinstance(every, bool):
            raise TypeError(f"`every` (={every!r}) must be an integer.")
        if every < 1:
            raise ValueError(f"`every` (={every}) must be at least 1; 50 is usual.")
        self._every = every
        self._with_reference = with_reference
        self.errors: dict[int, list[GradientError]] = {}
        """Measurements by the number of updates before them."""
        self.device = torch.device("cpu")
        """Device of the model."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the device."""
        self.device = pl_module.device

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Measure if a measurement is due."""
        assert isinstance(pl_module, ClassificationTask)
        update = trainer.global_step
        if update % self._every and update != pl_module.num_updates - 1:
            return
        images, labels = batch
        smoothing = pl_module.config.label_smoothing
        self.errors[update] = gradient_errors(
            pl_module.classifier.model,
            partial(F.cross_entropy, target=labels, label_smoothing=smoothing),
            images,
            with_reference=self._with_reference,
            forward_context=trainer.precision_plugin.train_step_context,
        )


class TrainingCurve(Callback):
    """Record the loss of each update and the validation error of each epoch."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self.val_errors: dict[int, float] = {}
        """Validation errors by the number of updates before them."""

    @property
    def losses(self) -> list[float]:
        """Losses of all updates, in order."""
        return [float(loss) for loss in self._losses]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the loss. It stays on its device, since reading it would make a GPU wait."""
        self._losses.append(outputs["loss"].detach())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the validation error."""
        if "val_accuracy" in trainer.callback_metrics:
            self.val_errors[trainer.global_step] = 1 - float(trainer.callback_metrics["val_accuracy"])
