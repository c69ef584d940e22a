"""The fixed-point coupling, which reverses exactly to the last bit.

All values of a stream are multiples of 2^-k, and each residual is rounded to such a multiple before it is added. Sums
and differences of these numbers are exact while they stay below 2^(p - k), where p is the number of bits in the
significand of the floating-point type. Subtracting a residual therefore restores the stream bit for bit. Gradients
pass through the rounding unchanged (the straight-through estimator).

References:
    Maclaurin et al. (2015), Gradient-based Hyperparameter Optimization through Reversible Learning, section 2.2.
    Bengio et al. (2013), Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation:
        the straight-through estimator.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from revnet._checks import check_bool, describe, is_integer
from revnet._torch_internals import in_functorch_transform, is_jit_tracing
from revnet._torch_release import is_exporting
from revnet.coupling._abstract import AbstractCoupling
from revnet.coupling._check import check_real, check_residual, is_differentiated

_SIGNIFICAND_BITS = {torch.float32: 24, torch.float64: 53}


@dataclass(frozen=True)
class FixedPoint(AbstractCoupling):
    """The additive coupling in fixed-point arithmetic: `y = x + residual`, reversed exactly to the last bit.

    All values of the stream are multiples of 2^-fraction_bits. Each residual is rounded to such a multiple before it is
    added, and gradients pass through this rounding unchanged. Reversal is exact while the stream stays below
    2^(24 - fraction_bits) in float32, or 2^(53 - fraction_bits) in float64. If a stream reaches this limit in a run
    that must rebuild it, the run raises `ReconstructionError`. Residuals are rounded under every policy, so all
    policies train the same network.

    Accuracy: if the residual functions are deterministic, activations and gradients equal the ones of a stored run bit
    for bit.
    Memory: 16-bit inputs become float32 streams. The residual functions and the output keep the dtype of the input.
    Time: each residual takes three passes over the stream instead of one, plus one pass that checks the range.

    Args:
        fraction_bits: The number of bits after the binary point, from 1 to 22, or to 51 if `is_wide`. With 14, float32
            streams must stay below 1,024.
        is_wide: Whether streams are float64. With 14 fraction bits they must then stay below 5e11, and they take twice
            the memory. The residual functions still compute in the dtype of the input.

    Raises:
        TypeError: `is_wide` is not a bool.
        ValueError: `fraction_bits` is out of range.

    References:
        Maclaurin et al. (2015), Gradient-based Hyperparameter Optimization through Reversible Learning, section 2.2.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import FixedPoint, ReversibleBlock
        >>> f, g = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> block = ReversibleBlock(f, g, coupling=FixedPoint(fraction_bits=12))
        >>> x = torch.tensor([[1.0, 0.5, 0.25, 2.0]])  # multiples of 2 ** -12
        >>> torch.equal(block.inverse(block(x)), x)
        True
    """

    is_additive: ClassVar[bool] = True
    is_exact: ClassVar[bool] = True

    fraction_bits: int = 14
    is_wide: bool = False

    def __post_init__(self) -> None:
        check_bool(is_wide=self.is_wide)
        if not is_integer(self.fraction_bits):
            raise ValueError(f"`fraction_bits` (={describe(self.fraction_bits)}) must be an integer; 14 is usual.")
        stream, most = ("float64", 51) if self.is_wide else ("float32", 22)
        if not 1 <= self.fraction_bits <= most:
            raise ValueError(
                f"`fraction_bits` (={describe(self.fraction_bits)}) must be from 1 to {most}, so that a {stream} "
                "stream has bits left before the point; 14 is usual, with a range of 1,024 in float32."
            )

    def prepare(self, x: Tensor) -> Tensor:
        """Return the stream in float32 or float64, rounded to the grid.

        Raises:
            TypeError: The stream is complex.
        """
        check_real(x, self)
        is_wide = self.is_wide or x.dtype == torch.float64
        return _to_grid(x.to(torch.float64 if is_wide else torch.float32), self.fraction_bits)

    def forward(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Return `x` plus the rounded residual."""
        check_residual(x, residual, name)
        return _add_on_grid(x, residual, self.fraction_bits)

    def inverse(self, y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
        """Return `y` minus the rounded residual."""
        check_residual(y, residual, name)
        return _subtract_on_grid(y, residual, self.fraction_bits, in_place=in_place)

    def log_det(self, x: Tensor, residual: Tensor) -> None:
        """Return None: the log-determinant is zero, since the coupling permutes the points of the grid."""

    def limit(self, dtype: torch.dtype) -> float:
        """Return 2^(significand bits - fraction_bits).

        Raises:
            TypeError: The dtype is neither float32 nor float64.
        """
        if dtype not in _SIGNIFICAND_BITS:
            raise TypeError(f"{self} needs a stream of float32 or float64, which `prepare` makes, but this is {dtype}.")
        return 2.0 ** (_SIGNIFICAND_BITS[dtype] - self.fraction_bits)

    def out_of_range_hint(self, magnitude: float, dtype: torch.dtype) -> str:
        """Return the setting with which a stream of this magnitude fits, if there is one."""
        fitting = _SIGNIFICAND_BITS[dtype] - math.floor(math.log2(magnitude)) - 1
        wider = "" if dtype == torch.float64 else "set `is_wide=True`"
        if fitting < 1:
            return wider or "no `fraction_bits` would fit: scale down the outputs of the residual functions"
        return f"set `fraction_bits={fitting}`" + (f" or less, {wider}" if wider else "")


_SMALL = 2**14
"""Number of elements up to which a call costs more than a pass over the tensor."""


def _to_grid(x: Tensor, fraction_bits: int) -> Tensor:
    """Round to the nearest multiple of 2^-fraction_bits, and -0 to 0; gradients pass through unchanged."""
    if is_exporting():
        return with_gradient_of(x, _TracedToGrid.forward(x.detach(), 2.0**fraction_bits))
    function = _TracedToGrid if torch.compiler.is_dynamo_compiling() else _ToGrid
    rounded: Tensor = function.apply(x, 2.0**fraction_bits)
    return rounded


def _add_on_grid(x: Tensor, residual: Tensor, fraction_bits: int) -> Tensor:
    """Return `x` plus the rounded residual, exact if `x` is on the grid; gradients are as for `x + residual`."""
    scale = 2.0**fraction_bits
    if is_exporting():
        return with_gradient_of(x + residual, _TracedAddOnGrid.forward(x.detach(), residual.detach(), scale))
    if torch.compiler.is_dynamo_compiling():
        y: Tensor = _TracedAddOnGrid.apply(x, residual, scale)
        return y
    is_small = type(x) is type(residual) is Tensor and x.numel() <= _SMALL
    # `torch.jit.trace` does not see what is written through `data`.
    if is_small and not x.is_meta and not in_functorch_transform() and not is_jit_tracing():
        # The node of a plain sum has the same gradients, and costs a tenth of a Python function's. Its values are then
        # replaced by those on the grid, through `data`, which autograd does not see.
        steps = _grid_steps(residual.data, x.dtype, scale)  # Before `y`: a prediction runs `_AddOnGrid`.
        y = x + residual
        torch.add(x.data, steps, alpha=1 / scale, out=y.data)
        return y
    return _AddOnGrid.apply(x, residual, scale)


def _subtract_on_grid(y: Tensor, residual: Tensor, fraction_bits: int, *, in_place: bool) -> Tensor:
    """Undo `_add_on_grid`, exactly to the last bit."""
    if is_differentiated(y, residual):
        return _add_on_grid(y, -residual, fraction_bits)  # The inverse is being differentiated. Rounding is symmetric.
    scale = 2.0**fraction_bits
    steps = _grid_steps(residual, y.dtype, scale)
    return y.sub_(steps, alpha=1 / scale) if in_place else torch.sub(y, steps, alpha=1 / scale)


def with_gradient_of(smooth: Tensor, values: Tensor) -> Tensor:
    """Return `values` with the gradient of `smooth`, for a program in a file, which has no autograd functions."""
    return values + (smooth - smooth.detach())


def _grid_steps(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Return `x` in steps of the grid; scaling by a power of two does not round."""
    return (x.to(dtype) * scale).round_()


# Each function has two forms, because `torch.compile` cannot trace one that defines `jvp`. Until PyTorch 2.11, it also
# loses the gradient of a result that was written in place.


class _TracedToGrid(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        # Adding 0.0 turns -0 into 0. Addition and subtraction on the grid could not restore the sign of a zero.
        return (x * scale).round() * (1 / scale) + 0.0

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _ToGrid(_TracedToGrid):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return _grid_steps(x, x.dtype, scale).mul_(1 / scale).add_(0.0)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0].view_as(tangents[0])


class _TracedAddOnGrid(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, residual: Tensor, scale: float) -> Tensor:
        # Multiplying by a power of two is exact, so this rounds at most once.
        return torch.add(x, (residual.to(x.dtype) * scale).round(), alpha=1 / scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], grads[0].to(ctx.dtype), None


class _AddOnGrid(_TracedAddOnGrid):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, residual: Tensor, scale: float) -> Tensor:
        return torch.add(x, _grid_steps(residual, x.dtype, scale), alpha=1 / scale)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0] + tangents[1]
