"""The task of fitting a density to images: loss and optimizer."""

from collections.abc import Mapping

from torch import Tensor

from revnet._units import format_loss, format_rate
from revnet.data._random_keys import Purpose, uniform
from revnet.data.transforms._random_flip import RandomHorizontalFlip
from revnet.training.density.config import NiceConfig
from revnet.training.density.model import ImageDensity
from revnet.training.run.task import AbstractTask, BestEpoch

Batch = tuple[Tensor, Tensor, Tensor]


class DensityTask(AbstractTask):
    """Maximum likelihood; the loss is in bits per dimension.

    Noise and flips are functions of the keys that come with each batch: in training, of seed, epoch and image, and in
    validation, of seed and image, so that epochs can be compared.

    Args:
        density: Density to fit.
        config: Settings of the run.
        num_updates: Updates of the whole run, for the schedule.
    """

    config: NiceConfig
    best_epoch = BestEpoch("val_loss", is_highest=False)

    def __init__(self, density: ImageDensity, config: NiceConfig, num_updates: int) -> None:
        super().__init__()
        self.density = density
        self.config = config
        self.num_updates = num_updates
        self.flip = RandomHorizontalFlip() if config.horizontal_flip else None

    @property
    def saved_module(self) -> ImageDensity:
        """The density."""
        return self.density

    def compute(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the loss of a training batch."""
        images, _, keys = batch
        if self.flip is not None:
            images = self.flip(images, uniform(keys, self.flip.num_draws, Purpose.AUGMENT))
        return (self.density(images, keys=keys).mean(),)

    def log_update(self, batch: Batch, loss: Tensor, *outputs: Tensor) -> None:
        """Log the loss of a training batch."""
        self.log_mean("train_loss", loss, len(batch[0]))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss on held-out images."""
        images, _, keys = batch
        self.log_mean("val_loss", self.density(images, keys=keys).mean(), len(images))

    def report(self, metrics: Mapping[str, float]) -> str:
        """Return bits per dimension and speed as text."""
        figures = f"bits/dim {format_loss(metrics['train_loss'])}"
        if "val_loss" in metrics:
            figures += f"  validation {format_loss(metrics['val_loss'])}"
        return f"{figures}  {format_rate(self.config.batch_size / metrics['step_seconds'], 'images')}"
