"""The coupling that reverses to the last bit: arithmetic on a grid, where subtraction undoes addition.

A stream lies on the multiples of 2^-k, and each residual is rounded to one before it is added. Sums and differences of
such numbers are exact as long as they stay below 2^(p - k), p the bits of the floating-point type's significand: so
that taking a residual off a stream again leaves the very bits that were there. The rounding has no derivative of its
own; gradients pass it straight through.

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

from revnet.functional._coupling import AbstractCoupling, check_residual

_SIGNIFICAND_BITS = {torch.float32: 24, torch.float64: 53}


@dataclass(frozen=True)
class FixedPoint(AbstractCoupling):
    """`y = x + residual` on a grid: what comes back is the old stream, to the last bit.

    The stream lies on the multiples of 2^-fraction_bits, to which each residual is rounded before it is added;
    gradients pass that rounding straight through. Reconstruction is exact as long as the stream stays below
    2^(24 - fraction_bits) in float32, 2^(53 - fraction_bits) in float64; beyond, the backward pass raises. It is the
    network of the rounded residuals that is trained, whatever the policies.

    Accuracy: activations and gradients are those of the stored run, bit for bit, if the residual functions are
    deterministic.
    Memory: inputs of 16 bits become streams of 32; functions read, and the output has, what the input was.
    Time: three passes over the stream for each residual in place of one, and one that watches the range.

    Args:
        fraction_bits: Bits behind the point, from 1 to 22, or 51 if wide: 14 leaves room up to 1,024 in float32.
        is_wide: Whether streams are float64, which holds integers of 53 bits: room up to 5e11 with 14 fraction bits, at
            twice the memory for streams. The residual functions compute in the type of the input as before.

    Raises:
        ValueError: `fraction_bits` is out of range.

    References:
        Maclaurin et al. (2015), Gradient-based Hyperparameter Optimization through Reversible Learning, section 2.2.
    """

    is_exact: ClassVar[bool] = True
    fraction_bits: int = 14
    is_wide: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.fraction_bits, bool) or not isinstance(self.fraction_bits, int):
            raise ValueError(f"`fraction_bits` (={self.fraction_bits!r}) must be a whole number; 14 is usual.")
        stream, most = ("float64", 51) if self.is_wide else ("float32", 22)
        if not 1 <= self.fraction_bits <= most:
            raise ValueError(
                f"`fraction_bits` (={self.fraction_bits}) must be from 1 to {most}, so that a {stream} stream has room "
                "before the point; 14 is usual, with room up to 1,024 in float32."
            )
        super().__post_init__()

    def enter(self, x: Tensor) -> Tensor:
        """The stream, rounded to the grid, in float32 or more."""
        if x.is_complex():
            raise TypeError(
                f"`x` has dtype {x.dtype}, but {self} needs real streams; use `Additive()` for complex ones."
            )
        is_wide = self.is_wide or x.dtype == torch.float64
        return _to_grid(x.to(torch.float64 if is_wide else torch.float32), self.fraction_bits)

    def join(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """`x` plus the rounded residual."""
        check_residual(x, residual, name)
        return _add_on_grid(x, residual, self.fraction_bits)

    def part(self, y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
        """`y` less the rounded residual."""
        check_residual(y, residual, name)
        return _subtract_on_grid(y, residual, self.fraction_bits, in_place=in_place)

    def log_det(self, x: Tensor, residual: Tensor) -> None:
        """None: on the grid it is a permutation."""

    def limit(self, dtype: torch.dtype) -> float:
        """2^(significand bits - fraction_bits)."""
        if dtype not in _SIGNIFICAND_BITS:
            raise TypeError(f"{self} needs a stream of float32 or float64, which `enter` makes, but this is {dtype}.")
        return 2.0 ** (_SIGNIFICAND_BITS[dtype] - self.fraction_bits)

    def way_out(self, magnitude: float, dtype: torch.dtype) -> str:
        """The `fraction_bits` that would fit, if there are such."""
        fitting = _SIGNIFICAND_BITS[dtype] - math.floor(math.log2(magnitude)) - 1
        wider = "" if dtype == torch.float64 else "set `is_wide=True`"
        if fitting < 1:
            return wider or "no `fraction_bits` would fit: let the residual functions return less"
        return f"set `fraction_bits={fitting}`" + (f" or less, {wider}" if wider else "")


def _to_grid(x: Tensor, fraction_bits: int) -> Tensor:
    """Round to the nearest multiple of 2^-fraction_bits, 0 for -0; gradients pass straight through."""
    function = _TracedToGrid if torch.compiler.is_dynamo_compiling() else _ToGrid
    rounded: Tensor = function.apply(x, 2.0**fraction_bits)
    return rounded


def _add_on_grid(x: Tensor, residual: Tensor, fraction_bits: int) -> Tensor:
    """`x` plus the rounded residual, exact where `x` is on the grid; gradients are those of `x + residual`."""
    function = _TracedAddOnGrid if torch.compiler.is_dynamo_compiling() else _AddOnGrid
    y: Tensor = function.apply(x, residual, 2.0**fraction_bits)
    return y


def _subtract_on_grid(y: Tensor, residual: Tensor, fraction_bits: int, *, in_place: bool) -> Tensor:
    """What `_add_on_grid` added the residual to, to the last bit."""
    if torch.is_grad_enabled() and (y.requires_grad or residual.requires_grad):
        return _add_on_grid(y, -residual, fraction_bits)  # The inverse is differentiated; rounding is symmetric.
    scale = 2.0**fraction_bits
    steps = _grid_steps(residual, y.dtype, scale)
    return y.sub_(steps, alpha=1 / scale) if in_place else torch.sub(y, steps, alpha=1 / scale)


def _grid_steps(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """How many steps of the grid; a power of two scales without rounding."""
    return (x.to(dtype) * scale).round_()


# Each in two forms, since `torch.compile` traces none that has a rule for forward-mode differentiation.


class _TracedToGrid(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        # No subtraction brings back a negative zero, and no addition makes one out of others: 0 takes its place.
        return _grid_steps(x, x.dtype, scale).mul_(1 / scale).add_(0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _ToGrid(_TracedToGrid):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0].view_as(tangents[0])


class _TracedAddOnGrid(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, residual: Tensor, scale: float) -> Tensor:
        # A product with a power of two is exact, so that this rounds once, if at all.
        return torch.add(x, _grid_steps(residual, x.dtype, scale), alpha=1 / scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], grads[0].to(ctx.dtype), None


class _AddOnGrid(_TracedAddOnGrid):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0] + tangents[1]
