"""The part of a LightningModule that all tasks share: what to save, which epoch is best, what to print."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule

from revnet.training.run.checkpoint import HEADER_KEY
from revnet.training.run.random_state import seed_batch
from revnet.training.saved_module import SavedModule
from revnet.training.settings.run_config import AbstractRunConfig


class BestEpoch(NamedTuple):
    """Rule for which epoch is the best."""

    metric: str
    """Name of a metric that validation logs."""
    is_highest: bool
    """Whether the highest value is the best; otherwise the lowest is."""

    def is_better(self, score: float, than: float) -> bool:
        """Return whether one score beats another; the earlier of two equal scores wins."""
        return score > than if self.is_highest else score < than


class AbstractTask(LightningModule, ABC):
    """Loss, metrics and optimizer of one task.

    It logs `train_loss` and, with validation, `val_loss`. Its module is the attribute `classifier`, `density` or
    `language_model`, by which a checkpoint finds its tensors.
    """

    config: AbstractRunConfig
    """Settings of the run."""
    num_updates: int
    """Updates of the whole run."""
    best_epoch: BestEpoch
    """Rule for which epoch is the best."""

    @property
    @abstractmethod
    def saved_module(self) -> SavedModule:
        """Module that is trained, and saved."""

    @abstractmethod
    def report(self, metrics: Mapping[str, float]) -> str:
        """Return the figures of an epoch as one line of text."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Seed the random numbers of the batch, so that they do not depend on what was drawn before."""
        seed_batch(self.trainer, self.config.seed)
        return batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the header to the checkpoint, so that the file says what it holds."""
        checkpoint[HEADER_KEY] = self.saved_module.header.to_metadata()
