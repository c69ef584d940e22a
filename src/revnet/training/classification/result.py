"""The result of training a classifier."""

from dataclasses import dataclass
from typing import Any

from revnet.training.evaluation.evaluate_result import EvaluateResult
from revnet.training.run.run_result import RunResult


@dataclass(frozen=True, kw_only=True)
class TrainResult(RunResult):
    """Result of a run that trains a classifier."""

    test: EvaluateResult
    """Evaluation of the last weights on the test set: the paper's protocol."""

    best_test: EvaluateResult | None
    """Evaluation of the best weights on the test set; None without validation."""

    best_val_accuracy: float | None
    """Validation accuracy in the best epoch; None without validation."""

    def _scores(self) -> list[tuple[str, str]]:
        lines = [("test accuracy", f"{self.test.report()}, last weights")]
        if self.best_test is not None:
            lines += [("", f"{self.best_test.report()}, best on validation (epoch {self.best_epoch})")]
        return lines

    def _score_entries(self) -> dict[str, Any]:
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
