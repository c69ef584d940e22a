"""The result of training a language model."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from revnet.training.run.run_result import RunResult


@dataclass(frozen=True, kw_only=True)
class LanguageResult(RunResult):
    """Result of a run that trains a language model."""

    samples: ClassVar[str] = "windows"

    data: str
    """Name of the text."""

    attention: str
    """Kind of attention."""

    val_loss: float
    """Validation loss of the last weights, in nats per character."""

    best_val_loss: float
    """Validation loss of the best weights, in nats per character."""

    num_val_characters: int
    """Number of characters that a validation predicts."""

    def _scores(self) -> list[tuple[str, str]]:
        unit = f"nats/character ({self.num_val_characters:,} characters), last weights"
        best = f"best on validation (epoch {self.best_epoch}), {self.best_val_loss / math.log(2):.4f} bits/character"
        best += f", perplexity {math.exp(min(self.best_val_loss, 700)):.2f}"
        return [("validation loss", f"{self.val_loss:.4f} {unit}"), ("", f"{self.best_val_loss:.4f}, {best}")]

    def _score_entries(self) -> dict[str, Any]:
        return {
            "model": "lm",
            "data": self.data,
            "attention": self.attention,
            "val_loss": self.val_loss,
            "val_characters": self.num_val_characters,
            "best_epoch": self.best_epoch,
            "best_val_loss": self.best_val_loss,
        }
