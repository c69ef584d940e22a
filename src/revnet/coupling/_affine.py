"""The affine coupling, in which the residual both scales and shifts the stream.

One half of a block computes `y = x * exp(log_scale) + shift`. Its inverse is `x = (y - shift) * exp(-log_scale)`, and
its log-determinant is the sum of `log_scale`.

References:
    Dinh, Sohl-Dickstein and Bengio (2017), Density Estimation Using Real NVP, equations 7 and 8.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from revnet._checks import check_choice, check_positive_number
from revnet.coupling._abstract import AbstractCoupling
from revnet.coupling._check import check_real, check_residual

Bound = Literal["tanh", "sigmoid"]


@dataclass(frozen=True)
class Affine(AbstractCoupling):
    """The affine coupling: `y = x * exp(log_scale) + shift`.

    Use it for density models, whose layers must change volumes. If you do not need a density, prefer `Additive()`,
    which is more accurate and uses less memory.

    The residual function returns the shift and a raw scale, concatenated along one dimension. For a stream
    (B, C, H, W), it returns (B, 2 C, H, W). Or it returns a tuple of the shift and a raw scale that broadcasts to the
    stream, such as a parameter of shape (C, 1, 1), so that the factor of each channel is learned. The raw scale is
    bounded, so that a block is invertible for any output of its residual function.

    Accuracy: each block adds the rounding of a product and a sum. Dividing by small scales magnifies the errors of
    the blocks above it. Reversal is never exact.
    Memory: like `Additive()`, plus one scale and one stream while a residual function is replayed.

    Args:
        bound: How the raw scale is bounded. "tanh" is `log_scale = reach * tanh(raw / reach)`, as in RealNVP.
            "sigmoid" is `exp(log_scale) = sigmoid(raw + 2)`, as in Glow; this scale is always below 1, but it can come
            arbitrarily close to 0.
        reach: The largest absolute value of `log_scale` with "tanh".

    Raises:
        ValueError: `bound` is unknown, or `reach` is not a positive number.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), Density Estimation Using Real NVP.
        Kingma and Dhariwal (2018), Glow: Generative Flow with Invertible 1x1 Convolutions, and its code.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet.coupling import Affine
        >>> from revnet.nn import CouplingLayer
        >>> layer = CouplingLayer(nn.Linear(2, 4), coupling=Affine())  # shift and scale
        >>> x = torch.rand(3, 4)
        >>> y, log_det = layer.forward_with_log_det(x)
        >>> torch.allclose(layer.inverse(y), x, atol=1e-5), log_det.shape
        (True, torch.Size([3]))
    """

    is_additive: ClassVar[bool] = False

    bound: Bound = "tanh"
    reach: float = 2.0

    def __post_init__(self) -> None:
        check_choice("bound", self.bound, ("tanh", "sigmoid"))
        check_positive_number("reach", self.reach, hint="2 is usual")

    def prepare(self, x: Tensor) -> Tensor:
        """Return the stream unchanged.

        Raises:
            TypeError: The stream is complex.
        """
        check_real(x, self)
        return x

    def forward(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Return `x * exp(log_scale) + shift`."""
        shift, raw = _halves(x, residual, name)
        return torch.addcmul(shift.to(x.dtype), x, self._log_scale(raw, x.dtype).exp())

    def inverse(self, y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
        """Return `(y - shift) * exp(-log_scale)`."""
        shift, raw = _halves(y, residual, name)
        x = y.sub_(shift) if in_place else y - shift
        scale = (-self._log_scale(raw, y.dtype)).exp()
        return x.mul_(scale) if in_place else x * scale

    def log_det(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the sum of `log_scale` for each sample."""
        _, raw = _halves(x, residual, "f")
        return self._log_scale(raw, x.dtype).expand_as(x).flatten(1).sum(1)

    def limit(self, dtype: torch.dtype) -> None:
        """Return None: reversal rounds at every magnitude."""

    def _log_scale(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        raw = raw.to(dtype)
        return F.logsigmoid(raw + 2) if self.bound == "sigmoid" else self.reach * torch.tanh(raw / self.reach)


def _halves(x: Tensor, residual: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return the shift and the raw scale, from a pair or from one tensor that has both along one dimension."""
    if isinstance(residual, tuple) and len(residual) == 2 and all(isinstance(part, Tensor) for part in residual):
        shift, raw = residual
        check_residual(x, shift, name)
        sizes = zip(raw.shape[::-1], x.shape[::-1], strict=False)  # Trailing dimensions are compared.
        if raw.dim() > x.dim() or any(size not in (1, size_of_x) for size, size_of_x in sizes):
            raise ValueError(
                f"`{name}` returned a scale of shape {tuple(raw.shape)}, which must broadcast to the shape of the "
                f"stream, {tuple(x.shape)}; for one factor per channel, return {(x.shape[1], *[1] * (x.dim() - 2))}."
            )
        return shift, raw
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
    raise AssertionError  # Unreachable: `check_residual` raised.
