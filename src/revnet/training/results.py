"""What training a classifier gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from revnet.training.evaluate_result import EvaluateResult
from revnet.training.run_result import RunResult


@dataclass(frozen=True, kw_only=True)
class TrainResult(RunResult):
    """What came out of training a classifier."""

    test: EvaluateResult
    """The test set with the last weights: the paper's protocol."""

    best_test: EvaluateResult | None
    """The test set with the best weights, if they were chosen by validation."""

    best_val_accuracy: float | None
    """Validation accuracy in the best epoch, the highest."""

    def _scores(self) -> list[tuple[str, str]]:
        lines = [("test accuracy", f"{self.test.report()}, last weights")]
        if self.best_test is not None:
            lines += [("", f"{self.best_test.report()}, best on validation (epoch {self.best_epoch})")]
        return lines

    def _figures(self) -> dict[str, Any]:
        return {
            "model": self.test.model,
            "data": self.test.data,
            "test_accuracy": self.test.accuracy,
            "test_error": self.test.error,
            "test_images": self.test.num_images,
            "best_epoch": self.best_epoch,
            "best_val_accuracy": self.best_val_accuracy,
            "best_test_accuracy": self.best_test and self.best_test.accuracy,
        }
