"""What a measurement of drift found, block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from revnet.nn import AbstractPolicy


@dataclass(frozen=True)
class GradientDrift:
    """A gradient from rebuilt activations beside the one from stored activations, both seen as one vector."""

    relative_error: float
    """Their distance over the length of the stored one."""
    angle_degrees: float
    """Between them."""


@dataclass(frozen=True)
class BlockDrift:
    """One reversible block."""

    name: str
    """Its place in the model: "stages.0.blocks.3"."""
    policy: AbstractPolicy
    """What it does with activations."""
    is_exact: bool
    """Whether its couplings promise that nothing is lost."""
    error: float | None
    """Relative error of the pair of streams that it was given, as rebuilt; None if they were not: they were kept, or
    nothing before them is trained."""
    amplification: float | None
    """By how much undoing the block multiplied the error that came from behind it, its own rounding included; None
    where none came."""
    gradient: GradientDrift | None = None
    """Of its parameters, if gradients were asked for and it trains any."""


@dataclass(frozen=True)
class Drift:
    """How far a step's rebuilt activations, and on request its gradients, were from the true ones.

    `print(drift)` shows a table, a verdict and what to do.
    """

    blocks: tuple[BlockDrift, ...]
    """All reversible blocks, in order."""
    dtype: torch.dtype | None
    """Of the streams; None if nothing was rebuilt."""
    gradient: GradientDrift | None = None
    """Of all parameters of the model, if gradients were asked for."""
    tolerance: float | None = None
    """The bound on errors that the model has; the tightest, if its sequences have several."""
    keyframes: tuple[str, ...] = ()
    """The residual functions before which a tolerance had the pair of streams kept, by their places in the model."""

    @property
    def error(self) -> float:
        """The largest error of any block, 0 if nothing was rebuilt; NaN or inf if there is one."""
        return 0.0 if self.worst is None or self.worst.error is None else self.worst.error

    @property
    def worst(self) -> BlockDrift | None:
        """The block with that error; of several, the last, where it begins. None if nothing was rebuilt."""
        worst, most = None, -1.0
        for block in self.blocks:
            if block.error is not None:
                rank = block.error if math.isfinite(block.error) else math.inf
                if rank >= most:
                    worst, most = block, rank
        return worst

    @property
    def amplification(self) -> float | None:
        """That of a block on average, the geometric mean; None if no error was handed on."""
        logs = [math.log(factor) for _, factor in self.amplifications() if factor > 0]
        return math.exp(sum(logs) / len(logs)) if logs else None

    def amplifications(self) -> list[tuple[BlockDrift, float]]:
        """The blocks that handed a finite error on, and how much larger."""
        return [
            (block, block.amplification)
            for block in self.blocks
            if block.amplification is not None and math.isfinite(block.amplification)
        ]

    def report(self) -> str:
        """A table of the blocks, the verdict, and what to do."""
        from revnet.numerics._drift_report import drift_lines

        return "\n".join(drift_lines(self))

    @property
    def verdict(self) -> str:
        """What it comes to, in a sentence or two."""
        from revnet.numerics._drift_verdict import verdict_on

        return verdict_on(self)

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do, the least effort first; empty if nothing has to be done."""
        from revnet.numerics._drift_verdict import advice_on

        return advice_on(self)

    def plot(self, path: str | Path, *, title: str = "") -> None:
        """Draw errors and amplification by depth.

        Args:
            path: The PNG file to write.
            title: What was measured: "RevNet-110, batch 32".

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from revnet.numerics._drift_plot import plot_drift

        plot_drift(self, Path(path), title=title)

    def __str__(self) -> str:
        return self.report()
