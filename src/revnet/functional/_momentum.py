"""The momentum coupling: a stream keeps a share of itself, and takes the rest from the residual.

References:
    Sander et al. (2021), Momentum Residual Neural Networks, equation 3.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from revnet.functional._coupling import AbstractCoupling, check_residual


@dataclass(frozen=True)
class Momentum(AbstractCoupling):
    """`y = gamma * x + (1 - gamma) * residual`: the velocity's half of a momentum block.

    Accuracy: undoing it divides by `gamma`, and so magnifies the errors of the blocks above at each block: by
    `gamma ** -depth`, 37,000 times for a hundred blocks at 0.9. Deep networks need a `gamma` near one, or float64.

    Args:
        gamma: The share that the stream keeps.

    Raises:
        ValueError: `gamma` is not between 0 and 1.

    References:
        Sander et al. (2021), Momentum Residual Neural Networks.
    """

    passes_gradients: ClassVar[bool] = False

    gamma: float = 0.9

    def __post_init__(self) -> None:
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, int | float) or not 0 < self.gamma < 1:
            raise ValueError(
                f"`gamma` (={self.gamma!r}) must be between 0 and 1: with 0 nothing is left to go back by, with 1 "
                "nothing is added; 0.9 is usual."
            )
        super().__post_init__()

    def enter(self, x: Tensor) -> Tensor:
        """The stream as it is."""
        return x

    def join(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """`gamma * x + (1 - gamma) * residual`."""
        check_residual(x, residual, name)
        return torch.add(self.gamma * x, residual, alpha=1 - self.gamma)

    def part(self, y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
        """`(y - (1 - gamma) * residual) / gamma`."""
        check_residual(y, residual, name)
        if in_place:
            return y.sub_(residual, alpha=1 - self.gamma).div_(self.gamma)
        return torch.sub(y, residual, alpha=1 - self.gamma) / self.gamma

    def log_det(self, x: Tensor, residual: Tensor) -> Tensor:
        """`log gamma` for each element; twice that for complex ones, which have two."""
        per_element = math.log(self.gamma) * (2 if x.is_complex() else 1)
        total = per_element * (x.numel() // max(1, x.shape[0]))
        return torch.full((x.shape[0],), total, dtype=x.real.dtype, device=x.device)

    def limit(self, dtype: torch.dtype) -> None:
        """None: there is rounding at every magnitude."""
