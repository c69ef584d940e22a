"""Products of integers with a factor, rounded, and the bits that undo the rounding.

Streams are integers `k` in steps of 2^-fraction_bits. Only the product `a k` loses information: with `|a| = p / 256`,
it is rounded to `floor((p k + 128) / 256)`. At most `ceil(1 / |a|)` integers have the same rounded product, and they
are neighbors. The forward pass keeps the place of each `k` among these, counted from 0 and packed into bytes.

Arithmetic is exact everywhere. Floating-point numbers serve as integers, because operations on them are many times
faster than on 64-bit integers:

- A factor of 1/2, 1/4, ... only changes the exponent of `k`, so numbers keep the dtype of the stream.
- Any other product with an integer of a float32 stream fits the 53 bits of float64.
- Any other product with an integer of a float64 stream needs 64-bit integers.

References:
    Maclaurin et al. (2015), Gradient-based Hyperparameter Optimization through Reversible Learning, section 2.2.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revnet._torch_internals import in_functorch_transform
from revnet._torch_release import is_exporting
from revnet.coupling._fixed_point import with_gradient_of

_SHIFT = 8
NUM_PARTS = 2**_SHIFT
"""A factor is a multiple of `1 / NUM_PARTS`."""
MOST_PARTS = 4 * NUM_PARTS
"""Parts of a factor below which the product with an integer of 53 bits fits 64 bits."""
_MOST_STEPS = 2**53
"""Magnitude up to which a stream of float64 holds every integer."""
_MOST_RESIDUAL = 2**62
"""Magnitude of a residual, in steps, up to which its sum with a product, which is below 2^55, fits 64 bits."""
_MOST_REBUILT = 2**53 + 2**40
"""Magnitude of a stream, in steps, up to which it can be rebuilt in 64 bits.

Rounding moves a stream in range by a few hundred steps at most, and the product of this number with any factor fits.
"""


@dataclass(frozen=True)
class ExactFactor:
    """A factor of a stream whose rounded product can be undone.

    Args:
        num_parts: Magnitude of the factor in parts of 1/256.
        sign: 1 or -1, or a tensor of these that broadcasts to the stream.
        fraction_bits: Bits of the stream after the binary point.
    """

    num_parts: int
    sign: int | Tensor
    fraction_bits: int

    @property
    def num_bits(self) -> int:
        """Bits that are kept for each element: 0, 1, 2, 4 or 8."""
        num_alike = -(-NUM_PARTS // self.num_parts)
        needed = (num_alike - 1).bit_length()
        return next(bits for bits in (0, 1, 2, 4, 8) if bits >= needed)

    @property
    def is_shift(self) -> bool:
        """Whether the magnitude is 1, 1/2, 1/4, ..., so that a product only changes the exponent."""
        return NUM_PARTS % self.num_parts == 0

    def combine(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the rounded product with the stream plus the rounded residual."""
        y: Tensor
        if is_exporting():
            y, _ = _TracedCombine.forward(x.detach(), residual.detach(), self, False)
            return with_gradient_of(x * self.value(x.dtype) + residual, y)
        y, _ = _form(_Combine, _TracedCombine).apply(x, residual, self, False)
        return y

    def combine_keeping(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what `combine` returns, and the lowest bits of the stream, packed into bytes; None for no bits."""
        y: Tensor
        kept: Tensor | None
        y, kept = _form(_Combine, _TracedCombine).apply(x, residual, self, self.num_bits > 0)
        return y, kept

    def separate(self, y: Tensor, residual: Tensor) -> Tensor:
        """Undo `combine` if no bits are kept, so that the result can be differentiated."""
        if is_exporting():
            values = _TracedSeparate.forward(y.detach(), residual.detach(), self)
            return with_gradient_of((y - residual) / self.value(y.dtype), values)
        x: Tensor = _form(_Separate, _TracedSeparate).apply(y, residual, self)
        return x

    def separate_kept(self, y: Tensor, residual: Tensor, kept: Tensor | None, *, in_place: bool) -> Tensor:
        """Undo `combine_keeping`."""
        scale = 2.0**self.fraction_bits
        if not self.is_shift:
            dtype = self._dtype_for(y)
            x = self._lowest(_steps(y, dtype, scale).sub_(_steps(residual, dtype, scale)))
            if kept is not None:
                x += _unpack(kept, y.shape, self.num_bits).to(x.dtype)
            x = _from_steps(x, y.dtype, scale)
            if dtype == torch.int64:
                plain = (y - residual).div_(self.value(y.dtype))
                x = torch.where(plain.abs() <= _MOST_REBUILT / scale, x, plain)
            return y.copy_(x) if in_place else x
        steps = _steps(residual, y.dtype, scale)
        x = y.sub_(steps, alpha=1 / scale) if in_place else torch.sub(y, steps, alpha=1 / scale)
        self._apply_sign(x)
        if kept is not None:
            num_alike = NUM_PARTS // self.num_parts
            places = _unpack(kept, y.shape, self.num_bits).to(y.dtype).sub_(num_alike // 2)
            x.mul_(num_alike).add_(places, alpha=1 / scale)
        return x

    def value(self, dtype: torch.dtype) -> float | Tensor:
        """Return the factor: a number, or a tensor if the sign is one."""
        sign = self.sign.to(dtype) if isinstance(self.sign, Tensor) else self.sign
        return sign * (self.num_parts / NUM_PARTS)

    def _dtype_for(self, x: Tensor) -> torch.dtype:
        """Return a dtype in which products with the integers of a stream are exact."""
        if self.is_shift:
            return x.dtype
        return torch.float64 if x.dtype == torch.float32 else torch.int64

    def _round(self, x: Tensor, *, keeps: bool) -> tuple[Tensor, Tensor | None]:
        """Return the rounded product with a stream, in steps, and the place of each integer if `keeps` is true."""
        dtype, scale = self._dtype_for(x), 2.0**self.fraction_bits
        if dtype == torch.int64:
            product = _steps(x, dtype, scale).mul_(self.num_parts).add_(NUM_PARTS // 2)
            rest = product & (NUM_PARTS - 1) if keeps else None
            # In float64, which divides faster. Half a part keeps a quotient off the boundary.
            places = None if rest is None else rest.to(torch.float64).add_(0.5).div_(self.num_parts).floor_()
            return product.bitwise_right_shift_(_SHIFT), places
        product = _scaled(x, dtype, scale * self.num_parts / NUM_PARTS)
        if self.num_parts == NUM_PARTS:
            return product, None
        if not keeps:
            return product.add_(0.5).floor_(), None
        rounded = (product + 0.5).floor_()
        # From -1/2 to 1/2. Each place takes up `p / 256` of this, so half a part keeps a quotient off the boundary.
        rest = product.sub_(rounded).mul_(NUM_PARTS / self.num_parts)
        if self.is_shift:
            return rounded, rest.add_(NUM_PARTS // 2 // self.num_parts)
        return rounded, rest.add_((NUM_PARTS // 2 + 0.5) / self.num_parts).floor_()

    def _lowest(self, rounded: Tensor) -> Tensor:
        """Return the lowest integer with each rounded product, which is overwritten."""
        self._apply_sign(rounded)
        least = self.num_parts - NUM_PARTS // 2 - 1
        if rounded.dtype == torch.int64:
            return rounded.mul_(NUM_PARTS).add_(least).div_(self.num_parts, rounding_mode="floor")
        # Half a part keeps the quotient off the boundary, where it could be rounded to the other side.
        return rounded.mul_(NUM_PARTS / self.num_parts).add_((least + 0.5) / self.num_parts).floor_()

    def _apply_sign(self, steps: Tensor) -> None:
        # Adding 0 turns -0 into 0; a stream that is rebuilt has no -0.
        if isinstance(self.sign, Tensor):
            steps.mul_(self.sign).add_(0)
        elif self.sign < 0:
            steps.neg_().add_(0)


# Each function has two forms, because `torch.compile` cannot trace one that defines `jvp`.


def _form(usual: Any, traced: Any) -> Any:
    return traced if torch.compiler.is_dynamo_compiling() else usual


class _TracedCombine(torch.autograd.Function):
    """Round and add; gradients are as for `a x + residual`."""

    @staticmethod
    def forward(x: Tensor, residual: Tensor, factor: ExactFactor, keeps: bool) -> tuple[Tensor, Tensor | None]:
        scale = 2.0**factor.fraction_bits
        steps, places = factor._round(x, keeps=keeps)
        factor._apply_sign(steps)
        added = _steps(residual, steps.dtype, scale)
        # `vmap` may have batched the residual alone, which then does not fit into the memory of the stream.
        total = steps + added if in_functorch_transform() else steps.add_(added)
        y = _from_steps(total, x.dtype, scale)
        if steps.dtype == torch.int64:
            # Integers know no NaN and no infinity, and wrap at 64 bits; plain arithmetic shows what left the range.
            # A sum in range may have a residual above it, of up to 2^53 + 2^55 steps.
            fits = (x.abs() <= _MOST_STEPS / scale) & (residual.abs() <= _MOST_RESIDUAL / scale)
            y = torch.where(fits, y, x * factor.value(x.dtype) + residual)
        return _returnable(y), None if places is None else _pack(places, factor.num_bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, residual, factor, _ = inputs
        ctx.dtype, ctx.factor = residual.dtype, factor
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor.value(grads[0].dtype), grads[0].to(ctx.dtype), None, None


class _Combine(_TracedCombine):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        of_x, of_residual = tangents[:2]
        return of_x * ctx.factor.value(of_x.dtype) + of_residual.to(of_x.dtype), None


class _TracedSeparate(torch.autograd.Function):
    """Undo `_Combine`, if it keeps nothing; gradients are as for `(y - residual) / a`."""

    @staticmethod
    def forward(y: Tensor, residual: Tensor, factor: ExactFactor) -> Tensor:
        return _returnable(factor.separate_kept(y, residual, None, in_place=False))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, residual, factor = inputs
        ctx.dtype, ctx.factor = residual.dtype, factor

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gradient = grads[0] / ctx.factor.value(grads[0].dtype)
        return gradient, -gradient.to(ctx.dtype), None


class _Separate(_TracedSeparate):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        of_y, of_residual = tangents[:2]
        return (of_y - of_residual.to(of_y.dtype)) / ctx.factor.value(of_y.dtype)


def _returnable(y: Tensor) -> Tensor:
    """Return `y`, or a copy: until PyTorch 2.11, `torch.compile` loses the gradient of a result written in place."""
    return y.clone() if torch.compiler.is_compiling() else y


def _scaled(x: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
    """Return a new tensor, `x` times a factor."""
    return x * factor if x.dtype == dtype else x.to(dtype).mul_(factor)


def _steps(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Return `x`, rounded to steps of the grid."""
    if dtype == torch.int64:
        return _scaled(x, torch.float64, scale).round_().to(dtype)
    return _scaled(x, dtype, scale).round_()


def _from_steps(steps: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Return the stream from its steps, which may be overwritten."""
    steps = steps.to(dtype) if steps.dtype == torch.int64 else steps
    return steps.mul_(1 / scale).to(dtype)


def _pack(numbers: Tensor, num_bits: int) -> Tensor:
    """Return numbers of `num_bits` bits, packed into bytes. The parts of one byte lie far apart in `numbers`."""
    # NaN and infinity have no place, and must not change the other parts of their bytes.
    per_byte, flat = 8 // num_bits, numbers.nan_to_num_(0.0).reshape(-1)
    if len(flat) % per_byte:
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % per_byte))
    first, *others = flat.view(per_byte, -1)
    for index, part in enumerate(others, 1):
        first.add_(part, alpha=2 ** (index * num_bits))
    return first.to(torch.uint8)


def _unpack(packed: Tensor, shape: torch.Size, num_bits: int) -> Tensor:
    """Return the numbers that `_pack` packed, as bytes."""
    mask = 2**num_bits - 1
    parts = [(packed >> shift) & mask for shift in range(0, 8, num_bits)]
    return torch.cat(parts)[: shape.numel()].view(shape)
