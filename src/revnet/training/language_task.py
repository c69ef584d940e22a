"""Training a language model: the loss and the optimiser."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F

from revnet._units import format_rate
from revnet.training._task import AbstractTask, Criterion
from revnet.training.language_config import LanguageConfig
from revnet.training.language_model import LanguageModel
from revnet.training.optimizers import adamw_along_a_cosine


class LanguageTask(AbstractTask):
    """Cross-entropy of the next character, in nats.

    A batch is (B, T + 1): windows, of which all but the last character are read and all but the first are guessed.

    Args:
        language_model: What is trained.
        config: Settings of the run.
        num_updates: Updates of the whole run, for the schedule.
    """

    criterion = Criterion("val_loss", is_highest=False)

    def __init__(self, language_model: LanguageModel, config: LanguageConfig, num_updates: int) -> None:
        super().__init__()
        self.lm = language_model
        self.config = config
        self.num_updates = num_updates

    @property
    def product(self) -> LanguageModel:
        """The language model."""
        return self.lm

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Give the loss of one update."""
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss on windows of the held-out text."""
        self.log("val_loss", self._loss(batch), batch_size=len(batch))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Make the optimiser, and the schedule that follows every update."""
        return adamw_along_a_cosine(self.lm.model, self.config, self.num_updates)

    def report(self, metrics: Mapping[str, float]) -> str:
        """Say loss and speed."""
        characters = self.config.batch_size * self.config.length / metrics["step_seconds"]
        loss = f"loss {metrics['train_loss']:.4f}  validation {metrics['val_loss']:.4f} nats/character"
        return f"{loss}  {format_rate(characters, 'characters')}"

    def _loss(self, windows: Tensor) -> Tensor:
        logits = self.lm(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
