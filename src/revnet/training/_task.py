"""What all tasks of training share: how a run finds out what to save, what is best, and what to tell."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule

from revnet.training._checkpoint import HEADER_KEY
from revnet.training._product import Product


class Criterion(NamedTuple):
    """Which epoch is the best."""

    metric: str
    """Name of what validation logs."""
    is_highest: bool
    """Whether the highest is the best; else it is the lowest."""

    def is_better(self, score: float, than: float) -> bool:
        """Whether the one beats the other; among equals the earlier is kept."""
        return score > than if self.is_highest else score < than


class AbstractTask(LightningModule, ABC):
    """Loss, metrics and optimiser of one task.

    It logs `train_loss` and, where something validates, `val_loss`; the attribute that holds the product is called as
    the `kind` in its header.
    """

    num_updates: int
    """Updates of the whole run."""
    criterion: Criterion
    """Which epoch is the best."""

    @property
    @abstractmethod
    def product(self) -> Product:
        """What is trained, and saved."""

    @abstractmethod
    def report(self, metrics: Mapping[str, float]) -> str:
        """Say in some words what an epoch came to."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the header beside the tensors, so that a checkpoint says what it is of."""
        checkpoint[HEADER_KEY] = self.product.header.to_metadata()
