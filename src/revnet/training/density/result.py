"""The result of fitting a density to images."""

from dataclasses import dataclass
from typing import Any

from revnet._units import counted
from revnet.training.run.run_result import RunResult


@dataclass(frozen=True, kw_only=True)
class DensityResult(RunResult):
    """Result of a run that fits a density to images."""

    model: str
    """Name of the model."""

    data: str
    """Name of the data set."""

    num_test_images: int
    """Images in the test set."""

    test_bits_per_dim: float
    """Bits per dimension of the test set with the last weights, for one draw of the noise."""

    best_test_bits_per_dim: float | None
    """Bits per dimension of the test set with the best weights; None without validation."""

    best_val_bits_per_dim: float | None
    """Bits per dimension of the validation images in the best epoch; None without validation."""

    def _scores(self) -> list[tuple[str, str]]:
        lines = [
            ("test bits/dim", f"{self.test_bits_per_dim:.4f} ({counted(self.num_test_images, 'image')}), last weights")
        ]
        if self.best_test_bits_per_dim is not None:
            best = f"{self.best_test_bits_per_dim:.4f}, best on validation (epoch {self.best_epoch})"
            lines.append(("", best))
        return lines

    def _score_entries(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "data": self.data,
            "test_images": self.num_test_images,
            "test_bits_per_dim": self.test_bits_per_dim,
            "best_epoch": self.best_epoch,
            "best_val_bits_per_dim": self.best_val_bits_per_dim,
            "best_test_bits_per_dim": self.best_test_bits_per_dim,
        }
