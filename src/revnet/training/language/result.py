"""The result of training a language model."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from revnet._units import format_loss, format_perplexity
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
        last = f"last weights, {self.num_val_characters:,} characters"
        best = f"best on validation (epoch {self.best_epoch})"
        return [
            ("validation loss", f"{_describe(self.val_loss)}, {last}"),
            ("", f"{_describe(self.best_val_loss)}, {best}"),
        ]

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


def _describe(loss: float) -> str:
    bits = format_loss(loss / math.log(2))
    return f"{format_loss(loss)} nats/character ({bits} bits/character, perplexity {format_perplexity(loss)})"
