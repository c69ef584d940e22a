"""The scaled coupling `y = a x + c s + b f(s)`, of which most reversible schemes are special cases.

`x` is the stream that is updated and `s` the one that the residual function reads. The inverse is
`x = (y - c s - b f(s)) / a`.
"""

import cmath
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from revnet._checks import describe, is_number
from revnet.coupling._abstract import AbstractCoupling
from revnet.coupling._check import check_residual


@dataclass(frozen=True)
class Scaled(AbstractCoupling):
    """The scaled coupling: `y = a x + c s + b f(s)`, where `s` is the stream that the residual function reads.

    With alternating streams, as in a `ReversibleBlock` that starts from two copies of its input, this is a two-step
    scheme `x[n+1] = a x[n-1] + c x[n] + b f(x[n])`. The named constructors give published schemes.

    The coefficients do not change while a pass is running: to change them during training, set a new coupling with
    `revnet.set_coupling`. Passes that are in flight keep the old one.

    Accuracy: the inverse divides by `a`, so it magnifies errors. See `growth`, and `ExactScaled` for an exact inverse.
    Memory: like `Additive()`.

    Args:
        a: Factor of the stream that is updated. It must not be 0.
        b: Factor of the residual.
        c: Factor of the stream that the residual function reads. Unless it is 0, all streams must have one shape.

    Raises:
        ValueError: A factor is not a finite number, or `a` is 0.

    References:
        Sander et al. (2021), Momentum Residual Neural Networks.
        Zhao et al. (2024), Dr2Net: Dynamic Reversible Dual-Residual Networks for Memory-Efficient Finetuning.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import ReversibleBlock
        >>> from revnet.coupling import Scaled
        >>> coupling = Scaled.consistent(0.5)
        >>> block = ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2), coupling=coupling)
        >>> x = torch.rand(3, 4)
        >>> torch.allclose(block.inverse(block(x)), x, atol=1e-5)
        True
    """

    is_additive: ClassVar[bool] = False
    is_linear: ClassVar[bool] = True

    a: float = 1.0
    b: float = 1.0
    c: float = 0.0

    def __post_init__(self) -> None:
        _check_finite(a=self.a, b=self.b, c=self.c)
        if self.a == 0:
            raise ValueError(
                "`a` (=0) must not be 0, because the stream that is updated would be lost; use a small value such as "
                "0.1, or the policy `Checkpoint()` on an ordinary network."
            )

    @classmethod
    def euler(cls, step_size: float = 1.0) -> "Scaled":
        """Return symplectic Euler, the coupling of RevNet with a step size: `y = x + h f(s)`.

        References:
            Chang et al. (2018), Reversible Architectures for Arbitrarily Deep Residual Neural Networks.
        """
        _check_finite(step_size=step_size)
        return cls(1.0, step_size, 0.0)

    @classmethod
    def midpoint(cls, step_size: float = 0.5) -> "Scaled":
        """Return the midpoint rule: `x[n+1] = x[n-1] + 2 h f(x[n])`. Errors do not grow.

        References:
            Chang et al. (2018), Reversible Architectures for Arbitrarily Deep Residual Neural Networks.
        """
        _check_finite(step_size=step_size)
        return cls(1.0, 2 * step_size, 0.0)

    @classmethod
    def rewired(cls) -> "Scaled":
        """Return the rewiring of a residual network: `x[n+1] = x[n-1] + f(x[n])`. Errors do not grow.

        References:
            Zhao et al. (2023), Re2TAL: Rewiring Pretrained Video Backbones for Reversible Temporal Action Localization.
        """
        return cls()

    @classmethod
    def leapfrog(cls, step_size: float = 1.0) -> "Scaled":
        """Return the leapfrog recurrence: `x[n+1] = 2 x[n] - x[n-1] + h^2 f(x[n])`.

        Errors grow linearly to quadratically. `revnet.nn.LeapfrogBlock` computes the same with a velocity, and is ten
        to two hundred times as accurate.

        References:
            Chang et al. (2018), Reversible Architectures for Arbitrarily Deep Residual Neural Networks.
        """
        _check_finite(step_size=step_size)
        return cls(-1.0, step_size**2, 2.0)

    @classmethod
    def momentum(cls, gamma: float = 0.9) -> "Scaled":
        """Return a momentum network as a two-step scheme: `x[n+1] = -g x[n-1] + (1 + g) x[n] + (1 - g) f(x[n])`.

        Errors grow by `1 / gamma` per function. `revnet.nn.MomentumBlock` computes the same with a velocity.

        References:
            Sander et al. (2021), Momentum Residual Neural Networks.
        """
        _check_finite(gamma=gamma)
        return cls(-gamma, 1 - gamma, 1 + gamma)

    @classmethod
    def equilibrium(cls, beta: float = 0.8) -> "Scaled":
        """Return the step of a reversible equilibrium network: `y = (1 - beta) x + beta f(s)`.

        Both functions of a block are one module there, and all blocks are one block. Errors grow by
        `(1 - beta) ** -0.5` per function.

        References:
            McCallum et al. (2025), Reversible Deep Equilibrium Models.
        """
        _check_finite(beta=beta)
        return cls(1 - beta, beta, 0.0)

    @classmethod
    def dual(cls, alpha: float, beta: float) -> "Scaled":
        """Return dual residual connections: `x[n+1] = beta x[n-1] + alpha x[n] + f(x[n])`.

        At `alpha=1` and `beta` near 0, the network computes almost what the residual network computes. Errors grow by
        `1 / beta` per function if `alpha = 1 - beta`.

        References:
            Zhao et al. (2024), Dr2Net: Dynamic Reversible Dual-Residual Networks for Memory-Efficient Finetuning.
        """
        _check_finite(alpha=alpha, beta=beta)
        return cls(beta, 1.0, alpha)

    @classmethod
    def consistent(cls, a: float) -> "Scaled":
        """Return the scheme of a family that stays close to the residual network: `b = 1 + a` and `c = 1 - a`.

        `a` near 0 is the residual network, `a = 1` the midpoint rule, and a negative `a` a momentum network. Errors
        grow by `1 / |a|` per function if `|a|` is below 1.
        """
        _check_finite(a=a)
        return cls(a, 1 + a, 1 - a)

    @property
    def growth(self) -> float:
        """Factor by which an error of the streams grows per residual function that is undone, at least.

        This is the inverse of the smallest root of `z^2 - c z - a`. The residual functions add to it.
        """
        root = cmath.sqrt(self.c**2 + 4 * self.a)
        # The product of the roots is -a; the difference of two large numbers could be 0 where the small root is not.
        return max(abs(self.c + root), abs(self.c - root)) / (2 * abs(self.a))

    @property
    def mixes(self) -> bool:
        """Whether the residual is scaled, or the stream that the function reads is added to it."""
        return self.b != 1 or self.c != 0

    def mix(self, source: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Return `c s + b f(s)`."""
        if self.c == 0:
            return residual * self.b if isinstance(residual, Tensor) else residual
        check_residual(source, residual, name)
        return torch.add(source * self.c, residual, alpha=self.b)

    def prepare(self, x: Tensor) -> Tensor:
        """Return the stream unchanged."""
        return x

    def forward(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Return `a x` plus the mixed residual."""
        check_residual(x, residual, name)
        return x + residual if self.a == 1 else torch.add(residual, x, alpha=self.a)

    def inverse(self, y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
        """Return the difference of `y` and the mixed residual, divided by `a`."""
        check_residual(y, residual, name)
        x = y.sub_(residual) if in_place else y - residual
        return x if self.a == 1 else x.div_(self.a) if in_place else x / self.a

    def log_det(self, x: Tensor, residual: Tensor) -> Tensor | None:
        """Return the number of elements per sample times `log |a|`; None if that is zero.

        A complex element counts twice, because it holds two real numbers.
        """
        if abs(self.a) == 1:
            return None
        return log_det_of_factor(x, self.a)

    def limit(self, dtype: torch.dtype) -> None:
        """Return None: reversal rounds at every magnitude."""


def _check_finite(**values: float) -> None:
    for name, value in values.items():
        if not is_number(value) or not math.isfinite(value):
            raise ValueError(f"`{name}` (={describe(value)}) must be a finite number, such as 0.5.")


def log_det_of_factor(x: Tensor, factor: float) -> Tensor:
    """Return the log-determinant of `x -> factor x` for each sample."""
    per_element = math.log(abs(factor)) * (2 if x.is_complex() else 1)
    total = per_element * (x.numel() // max(1, x.shape[0]))
    return torch.full((x.shape[0],), total, dtype=x.real.dtype, device=x.device)
