"""The momentum coupling, which averages the stream and the residual.

References:
    Sander et al. (2021), Momentum Residual Neural Networks, equation 3.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from revnet._checks import describe, is_number
from revnet.coupling._abstract import AbstractCoupling
from revnet.coupling._check import check_residual
from revnet.coupling._scaled import log_det_of_factor


@dataclass(frozen=True)
class Momentum(AbstractCoupling):
    """The momentum coupling: `y = gamma * x + (1 - gamma) * residual`.

    It updates the velocity of a momentum block.

    Accuracy: the inverse divides by `gamma`, so each block magnifies the errors of the blocks above it. Over the depth
    of the network, errors grow by `gamma ** -depth`: 37,000 times for 100 blocks with `gamma=0.9`. Deep networks need
    a `gamma` close to 1, or float64.

    Args:
        gamma: The share of the stream that is kept, between 0 and 1.

    Raises:
        ValueError: `gamma` is not between 0 and 1.

    References:
        Sander et al. (2021), Momentum Residual Neural Networks.

    Example:
        >>> import torch
        >>> from revnet.coupling import Momentum
        >>> coupling = Momentum(gamma=0.5)
        >>> coupling.forward(torch.tensor([4.0]), torch.tensor([2.0]), "f")
        tensor([3.])
    """

    is_additive: ClassVar[bool] = False
    is_linear: ClassVar[bool] = True

    gamma: float = 0.9

    def __post_init__(self) -> None:
        if not is_number(self.gamma) or not 0 < self.gamma < 1:
            raise ValueError(
                f"`gamma` (={describe(self.gamma)}) must be between 0 and 1: with 0 the stream is lost, with 1 the "
                "residual is; 0.9 is usual."
            )

    def prepare(self, x: Tensor) -> Tensor:
        """Return the stream unchanged."""
        return x

    def forward(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Return `gamma * x + (1 - gamma) * residual`."""
        check_residual(x, residual, name)
        return torch.add(self.gamma * x, residual, alpha=1 - self.gamma)

    def inverse(self, y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
        """Return `(y - (1 - gamma) * residual) / gamma`."""
        check_residual(y, residual, name)
        if in_place:
            return y.sub_(residual, alpha=1 - self.gamma).div_(self.gamma)
        return torch.sub(y, residual, alpha=1 - self.gamma) / self.gamma

    def log_det(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the number of elements per sample times `log(gamma)`.

        A complex element counts twice, because it holds two real numbers.
        """
        return log_det_of_factor(x, self.gamma)

    def limit(self, dtype: torch.dtype) -> None:
        """Return None: reversal rounds at every magnitude."""
