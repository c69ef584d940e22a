"""The affine coupling: a residual scales the stream as well as shifting it.

One half of a block is `y = x * exp(log_scale) + shift`, undone by `x = (y - shift) * exp(-log_scale)`; its
log-determinant is the sum of `log_scale`.

References:
    Dinh, Sohl-Dickstein and Bengio (2017), Density Estimation Using Real NVP, equations 7 and 8.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from revnet.functional._coupling import AbstractCoupling, check_residual

Bound = Literal["tanh", "sigmoid"]


@dataclass(frozen=True)
class Affine(AbstractCoupling):
    """`y = x * exp(log_scale) + shift`, both from the residual function: for densities, where volumes must change.

    The residual function returns `shift` and a raw scale one after the other: a tensor twice as large as the stream
    along one dimension, for instance (B, 2 C, H, W) for a stream (B, C, H, W). The raw scale is bounded, so that one
    function cannot make its block impossible to undo.

    Accuracy: what comes back carries the rounding of a product and a sum, and dividing by small scales magnifies the
    errors of the blocks above; nothing is exact. Where no density is wanted, take `Additive()`.
    Memory: as additive, and while one function is computed again, its scale and its stream too.

    Args:
        bound: "tanh", `log_scale = reach * tanh(raw / reach)`, as in RealNVP; or "sigmoid", `exp(log_scale) =
            sigmoid(raw + 2)`, as in Glow: never above 1, but as near to 0 as the function likes.
        reach: The largest `log_scale` of "tanh", up or down.

    Raises:
        ValueError: There is no such bound, or `reach` is not positive.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), Density Estimation Using Real NVP.
        Kingma and Dhariwal (2018), Glow: Generative Flow with Invertible 1x1 Convolutions, and its code.
    """

    passes_gradients: ClassVar[bool] = False

    bound: Bound = "tanh"
    reach: float = 2.0

    def __post_init__(self) -> None:
        if self.bound not in ("tanh", "sigmoid"):
            raise ValueError(f"`bound` (={self.bound!r}) must be 'tanh' or 'sigmoid'.")
        if isinstance(self.reach, bool) or not isinstance(self.reach, int | float) or not 0 < self.reach < math.inf:
            raise ValueError(f"`reach` (={self.reach!r}) must be a positive number; 2 is usual.")
        super().__post_init__()

    def enter(self, x: Tensor) -> Tensor:
        """The stream as it is."""
        if x.is_complex():
            raise TypeError(
                f"`x` has dtype {x.dtype}, but {self} needs real streams; use `Additive()` for complex ones."
            )
        return x

    def join(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """`x * exp(log_scale) + shift`."""
        shift, raw = _halves(x, residual, name)
        return torch.addcmul(shift.to(x.dtype), x, self._log_scale(raw, x.dtype).exp())

    def part(self, y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
        """`(y - shift) * exp(-log_scale)`."""
        shift, raw = _halves(y, residual, name)
        x = y.sub_(shift) if in_place else y - shift
        scale = (-self._log_scale(raw, y.dtype)).exp()
        return x.mul_(scale) if in_place else x * scale

    def log_det(self, x: Tensor, residual: Tensor) -> Tensor:
        """The sum of `log_scale`."""
        _, raw = _halves(x, residual, "f")
        return self._log_scale(raw, x.dtype).flatten(1).sum(1)

    def limit(self, dtype: torch.dtype) -> None:
        """None: there is rounding at every magnitude."""

    def _log_scale(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        raw = raw.to(dtype)
        return F.logsigmoid(raw + 2) if self.bound == "sigmoid" else self.reach * torch.tanh(raw / self.reach)


def _halves(x: Tensor, residual: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Shift and raw scale, along the one dimension in which the residual is twice as large as the stream."""
    if isinstance(residual, Tensor):
        doubled = [dim for dim in range(min(x.dim(), residual.dim())) if residual.shape[dim] == 2 * x.shape[dim] != 0]
        if len(doubled) != 1 or x.dim() != residual.dim():
            raise ValueError(
                f"`{name}` returned shape {tuple(residual.shape)}, but must return a shift and a scale one after the "
                f"other: the shape of the stream, {tuple(x.shape)}, with one dimension doubled, such as the channels."
            )
        shift, raw = residual.chunk(2, doubled[0])
        check_residual(x, shift, name)
        return shift, raw
    check_residual(x, residual, name)
    raise AssertionError  # It has raised.
