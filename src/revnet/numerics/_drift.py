"""Drift of a whole model."""

from dataclasses import dataclass
from pathlib import Path

import torch

from revnet.numerics._block_drift import BlockDrift, GradientDrift, amplifications, mean_amplification, worst_block
from revnet.numerics._drift_plot import plot_drift
from revnet.numerics._drift_report import drift_lines
from revnet.numerics._drift_verdict import advice_on, verdict_on


@dataclass(frozen=True)
class Drift:
    """Errors of the rebuilt activations of a step and, on request, of its gradients.

    `print` shows a table, a verdict and advice.
    """

    blocks: tuple[BlockDrift, ...]
    """All reversible blocks, in order."""
    dtype: torch.dtype | None
    """Data type of the streams; None if nothing was rebuilt."""
    gradient: GradientDrift | None = None
    """Drift of the gradient of all parameters; None if gradients were not compared."""
    tolerance: float | None = None
    """Bound on errors that is set on the model; if its sequences have different ones, the tightest."""
    keyframes: tuple[str, ...] = ()
    """Names of the residual functions before which a tolerance kept the pair of streams."""

    @property
    def error(self) -> float:
        """Largest error of any block; 0 if nothing was rebuilt, NaN or inf if a block has it."""
        return 0.0 if self.worst is None or self.worst.error is None else self.worst.error

    @property
    def worst(self) -> BlockDrift | None:
        """Block with the largest error, and of several the last, where it begins; None if nothing was rebuilt."""
        return worst_block(self.blocks)

    @property
    def amplification(self) -> float | None:
        """Geometric mean of the amplifications of the blocks; None if there is none."""
        return mean_amplification(self.blocks)

    def amplifications(self) -> list[tuple[BlockDrift, float]]:
        """Return the blocks with a finite amplification, and the amplification."""
        return amplifications(self.blocks)

    @property
    def verdict(self) -> str:
        """Judgment of the drift in one or two sentences."""
        return verdict_on(self.blocks, self.gradient)

    @property
    def advice(self) -> tuple[str, ...]:
        """Ways to reduce the drift, the easiest first; empty if it is small enough."""
        return advice_on(self.blocks, self.gradient, self.dtype, self.tolerance)

    def report(self) -> str:
        """Return a table of the blocks, the verdict and the advice."""
        return "\n".join(drift_lines(self.blocks, self.gradient, self.keyframes, self.verdict, self.advice))

    def plot(self, path: str | Path, *, title: str = "") -> None:
        """Draw errors and amplification by depth.

        Args:
            path: PNG file to write.
            title: Title of the picture, such as "RevNet-110, batch 32".

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        plot_drift(self.blocks, self.keyframes, Path(path), title=title)

    def __str__(self) -> str:
        return self.report()
