"""The result of training a language model."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from revnet._units import format_loss, format_perplexity
from revnet.data.sources.text import bits_per_byte
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
    """Validation loss of the last weights, in nats per token."""

    best_val_loss: float
    """Validation loss of the best weights, in nats per token."""

    num_val_tokens: int
    """Number of tokens that a validation predicts."""

    num_val_bytes: int
    """Number of bytes of these tokens."""

    token: Literal["character", "token"] = "character"
    """Noun for a token."""

    @property
    def val_bits_per_byte(self) -> float:
        """Validation loss of the last weights, in bits per byte, which compares different tokens of the same text."""
        return self._per_byte(self.val_loss)

    @property
    def best_val_bits_per_byte(self) -> float:
        """Validation loss of the best weights, in bits per byte."""
        return self._per_byte(self.best_val_loss)

    def _per_byte(self, loss: float) -> float:
        return bits_per_byte(loss, self.num_val_bytes / self.num_val_tokens)

    def _scores(self) -> list[tuple[str, str]]:
        last = f"last weights, {self.num_val_tokens:,} {self.token}s"
        best = f"best on validation (epoch {self.best_epoch})"
        return [
            ("validation loss", f"{self._describe(self.val_loss)}, {last}"),
            ("", f"{self._describe(self.best_val_loss)}, {best}"),
        ]

    def _describe(self, loss: float) -> str:
        bits = f"{format_loss(loss / math.log(2))} bits/{self.token}"
        if self.num_val_bytes != self.num_val_tokens:
            bits += f", {format_loss(self._per_byte(loss))} bits/byte"
        return f"{format_loss(loss)} nats/{self.token} ({bits}, perplexity {format_perplexity(loss)})"

    def _score_entries(self) -> dict[str, Any]:
        return {
            "model": "lm",
            "data": self.data,
            "attention": self.attention,
            "val_loss": self.val_loss,
            f"val_{self.token}s": self.num_val_tokens,
            "val_bytes": self.num_val_bytes,
            "val_bits_per_byte": self.val_bits_per_byte,
            "best_epoch": self.best_epoch,
            "best_val_loss": self.best_val_loss,
            "best_val_bits_per_byte": self.best_val_bits_per_byte,
        }
