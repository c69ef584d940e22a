"""Fitting a density to images: the loss and the optimiser."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from revnet._units import format_rate
from revnet.training._task import AbstractTask, Criterion
from revnet.training.density import ImageDensity
from revnet.training.nice_config import NiceConfig
from revnet.training.optimizers import adamw_along_a_cosine

Batch = tuple[Tensor, Tensor]


class DensityTask(AbstractTask):
    """Maximum likelihood; the loss is in bits per dimension.

    Args:
        density: What is trained.
        config: Settings of the run.
        num_updates: Updates of the whole run, for the schedule.
    """

    criterion = Criterion("val_loss", is_highest=False)

    def __init__(self, density: ImageDensity, config: NiceConfig, num_updates: int) -> None:
        super().__init__()
        self.nice = density
        self.config = config
        self.num_updates = num_updates
        self._noise: torch.Generator | None = None

    @property
    def product(self) -> ImageDensity:
        """The density."""
        return self.nice

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Give the loss of one update."""
        images, _ = batch
        if self.config.horizontal_flip:
            is_mirrored = torch.rand(len(images), device=images.device) < 0.5
            images = torch.where(is_mirrored[:, None, None, None], images.flip(3), images)
        loss = self.nice(images).mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Draw the same noise in every epoch, so that they can be compared."""
        self._noise = torch.Generator().manual_seed(self.config.seed)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss on held-out images."""
        images, _ = batch
        self.log("val_loss", self.nice(images, self._noise).mean(), batch_size=len(images))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Make the optimiser, and the schedule that follows every update."""
        return adamw_along_a_cosine(self.nice.model, self.config, self.num_updates)

    def report(self, metrics: Mapping[str, float]) -> str:
        """Say bits per dimension and speed."""
        figures = f"bits/dim {metrics['train_loss']:.4f}"
        if "val_loss" in metrics:
            figures += f"  validation {metrics['val_loss']:.4f}"
        return f"{figures}  {format_rate(self.config.batch_size / metrics['step_seconds'], 'images')}"
