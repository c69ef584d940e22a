"""The scaled coupling in fixed-point arithmetic, which reverses exactly to the last bit.

Streams are integers `k` in steps of 2^-fraction_bits. Only the product `a k` loses information: with `|a| = p / 256`,
it is rounded to `floor((p k + 128) / 256)`. At most `ceil(1 / |a|)` integers have the same rounded product, and they
are neighbors, so the lowest `ceil(log2(ceil(1 / |a|)))` bits of `k` tell them apart. The forward pass keeps these bits,
packed into bytes.

References:
    Maclaurin et al. (2015), Gradient-based Hyperparameter Optimization through Reversible Learning, section 2.2.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from revnet.coupling._abstract import AbstractCoupling
from revnet.coupling._check import check_real, check_residual
from revnet.coupling._fixed_point import FixedPoint
from revnet.coupling._scaled import Scaled, log_det_of_factor

_SHIFT = 8
"""`a` is a multiple of `2 ** -_SHIFT`."""
_MOST_PARTS = 2**10
"""Parts of `a` below which the product with an integer of 53 bits fits 64 bits."""


@dataclass(frozen=True)
class ExactScaled(AbstractCoupling):
    """The scaled coupling in fixed-point arithmetic: `y = a x + c s + b f(s)`, reversed exactly to the last bit.

    The factor `a` is rounded to a multiple of 1/256. `a x` and `c s + b f(s)` are each rounded to a multiple of
    2^-fraction_bits, and gradients pass through the rounding unchanged.

    Accuracy: like `FixedPoint()`, including the range of the streams. Nothing grows with depth, whatever `a` is.
    Memory: `num_bits` bits for each element of the updated stream and each function, from its forward to its backward
    pass: none for `|a|` of 1 or more, 1 from 1/2 on, 2 from 1/4 on, 4 from 1/16 on, and 8 below.

    Args:
        scaled: The factors. `|a|` must be from 1/256 to below 4.
        fraction_bits: See `FixedPoint`.
        is_wide: See `FixedPoint`.

    Raises:
        TypeError: `scaled` is not a `Scaled`, or `is_wide` is not a bool.
        ValueError: `a` or `fraction_bits` is out of range.

    Example:
        >>> import torch
        >>> from revnet.coupling import ExactScaled, Scaled
        >>> coupling = ExactScaled(Scaled.dual(alpha=0.5, beta=0.5))
        >>> x, residual = torch.tensor([1.0, 1.5]), torch.tensor([0.25, 0.25])
        >>> y, kept = coupling.forward_keeping(x, residual)
        >>> torch.equal(coupling.inverse_kept(y, residual, kept), x)
        True
    """

    is_additive: ClassVar[bool] = False
    is_linear: ClassVar[bool] = True
    is_exact: ClassVar[bool] = True

    scaled: Scaled
    fraction_bits: int = 14
    is_wide: bool = False
    _grid: FixedPoint = field(init=False, repr=False)
    num_parts: int = field(init=False, repr=False)
    """`|a|` in parts of 1/256."""
    num_bits: int = field(init=False, repr=False)
    """Bits that are kept for each element: 0, 1, 2, 4 or 8."""

    def __post_init__(self) -> None:
        if not isinstance(self.scaled, Scaled):
            raise TypeError(f"`scaled` (={self.scaled!r}) must be a `Scaled`, such as `Scaled.consistent(0.5)`.")
        object.__setattr__(self, "_grid", FixedPoint(self.fraction_bits, self.is_wide))
        num_parts = round(abs(self.scaled.a) * 2**_SHIFT)
        if not 1 <= num_parts < _MOST_PARTS:
            raise ValueError(
                f"`a` of `scaled` (={self.scaled.a:g}) must have a magnitude from 1/256 to below 4; use `Scaled` "
                "itself, which is not exact, or another factor."
            )
        num_alike = -(-(2**_SHIFT) // num_parts)
        needed = (num_alike - 1).bit_length()
        object.__setattr__(self, "num_parts", num_parts)
        object.__setattr__(self, "num_bits", next(bits for bits in (0, 1, 2, 4, 8) if bits >= needed))

    @property
    def a(self) -> float:
        """Factor of the stream that is updated, rounded to a multiple of 1/256."""
        return (self.num_parts if self.scaled.a > 0 else -self.num_parts) / 2**_SHIFT

    @property
    def remembers(self) -> bool:
        """Whether the inverse needs bits of the stream that the forward pass keeps."""
        return self.num_bits > 0

    @property
    def mixes(self) -> bool:
        """Whether the residual is scaled, or the stream that the function reads is added to it."""
        return self.scaled.mixes

    def mix(self, source: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Return `c s + b f(s)`."""
        return self.scaled.mix(source, residual, name)

    def prepare(self, x: Tensor) -> Tensor:
        """Return the stream in float32 or float64, rounded to the grid.

        Raises:
            TypeError: The stream is complex.
        """
        check_real(x, self)
        return self._grid.prepare(x)

    def forward(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Return the rounded `a x` plus the rounded residual."""
        check_residual(x, residual, name)
        y: Tensor
        y, _ = _Combine.apply(x, residual, self, False)
        return y

    def forward_keeping(self, x: Tensor, residual: Tensor, name: str = "f") -> tuple[Tensor, Tensor | None]:
        """Return what `forward` returns, and the lowest bits of the stream, packed into bytes; None for no bits."""
        check_residual(x, residual, name)
        y: Tensor
        kept: Tensor | None
        y, kept = _Combine.apply(x, residual, self, self.num_bits > 0)
        return y, kept

    def inverse(self, y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
        """Compute the stream, if nothing of it was lost.

        Raises:
            ValueError: `|a|` is below 1, so bits of the stream were lost.
        """
        if self.num_bits:
            raise ValueError(
                f"the inverse of `{name}` needs the bits that {self} keeps in the forward pass; only the backward pass "
                "has them. Use `Scaled` itself, which is not exact, or a factor `a` of 1 or more."
            )
        if torch.is_grad_enabled() and (y.requires_grad or residual.requires_grad):
            check_residual(y, residual, name)
            x: Tensor = _Separate.apply(y, residual, self)
            return x
        return self.inverse_kept(y, residual, None, name, in_place=in_place)

    def inverse_kept(
        self, y: Tensor, residual: Tensor, kept: Tensor | None, name: str = "f", *, in_place: bool = False
    ) -> Tensor:
        """Compute the stream from `y`, the residual and the bits that `forward_keeping` returned."""
        check_residual(y, residual, name)
        scale = 2.0**self.fraction_bits
        rounded = _steps(y, y.dtype, scale).sub_(_steps(residual, y.dtype, scale))
        if self.scaled.a < 0:
            rounded.neg_()
        # The lowest integer with this rounded product.
        lowest = rounded.mul_(2**_SHIFT).sub_(2 ** (_SHIFT - 1) - self.num_parts + 1)
        lowest = lowest.div_(self.num_parts, rounding_mode="floor")
        if kept is not None:
            bits = _unpack(kept, y.shape, self.num_bits)
            lowest += (bits - lowest) & (2**self.num_bits - 1)
        x = lowest.to(y.dtype).mul_(1 / scale)
        return y.copy_(x) if in_place else x

    def log_det(self, x: Tensor, residual: Tensor) -> Tensor | None:
        """Return the number of elements per sample times `log |a|`; None if that is zero."""
        return None if abs(self.a) == 1 else log_det_of_factor(x, self.a)

    def limit(self, dtype: torch.dtype) -> float:
        """Return 2^(significand bits - fraction_bits).

        Raises:
            TypeError: The dtype is neither float32 nor float64.
        """
        return self._grid.limit(dtype)

    def out_of_range_hint(self, magnitude: float, dtype: torch.dtype) -> str:
        """Return the setting with which a stream of this magnitude fits, if there is one."""
        return self._grid.out_of_range_hint(magnitude, dtype)


class _Combine(torch.autograd.Function):
    """Round and add; gradients are as for `a x + residual`."""

    @staticmethod
    def forward(x: Tensor, residual: Tensor, coupling: ExactScaled, keeps: bool) -> tuple[Tensor, Tensor | None]:
        scale = 2.0**coupling.fraction_bits
        steps = _steps(x, x.dtype, scale)
        kept = _pack(steps, coupling.num_bits) if keeps else None
        steps.mul_(coupling.num_parts).add_(2 ** (_SHIFT - 1)).bitwise_right_shift_(_SHIFT)
        if coupling.scaled.a < 0:
            steps.neg_()
        steps += _steps(residual, x.dtype, scale)
        # Integers know no NaN and no infinity, which plain arithmetic would pass on.
        return torch.add(steps.to(x.dtype).mul_(1 / scale), x + residual, alpha=0), kept

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, residual, coupling, _ = inputs
        ctx.dtype, ctx.factor = residual.dtype, coupling.a
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, grads[0].to(ctx.dtype), None, None


class _Separate(torch.autograd.Function):
    """Undo `_Combine`, if it keeps nothing; gradients are as for `(y - residual) / a`."""

    @staticmethod
    def forward(y: Tensor, residual: Tensor, coupling: ExactScaled) -> Tensor:
        return coupling.inverse_kept(y, residual, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, residual, coupling = inputs
        ctx.dtype, ctx.factor = residual.dtype, coupling.a

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0] / ctx.factor
        return grad, -grad.to(ctx.dtype), None


def _steps(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Return `x`, rounded to steps of the grid, as integers."""
    return (x.to(dtype) * scale).round_().to(torch.int64)


def _pack(steps: Tensor, num_bits: int) -> Tensor:
    """Return the lowest bits of integers, packed into bytes."""
    per_byte = 8 // num_bits
    bits = (steps & (2**num_bits - 1)).to(torch.uint8).flatten()
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % per_byte)).view(-1, per_byte)
    packed = padded[:, 0].clone()
    for index in range(1, per_byte):
        packed |= padded[:, index] << (index * num_bits)
    return packed


def _unpack(packed: Tensor, shape: torch.Size, num_bits: int) -> Tensor:
    """Return the integers whose bits `_pack` packed."""
    shifts = torch.arange(0, 8, num_bits, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] >> shifts) & (2**num_bits - 1)
    return bits.flatten()[: shape.numel()].view(shape).to(torch.int64)
