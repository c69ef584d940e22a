"""Products of integers with a factor, rounded, and the bits that undo the rounding.

Streams are integers `k` in steps of 2^-fraction_bits. Only the product `a k` loses information: with `|a| = p / 256`,
it is rounded to `floor((p k + 128) / 256)`. At most `ceil(1 / |a|)` integers have the same rounded product, and they
are neighbors, so the lowest `ceil(log2(ceil(1 / |a|)))` bits of `k` tell them apart. The forward pass keeps these bits,
packed into bytes.

References:
    Maclaurin et al. (2015), Gradient-based Hyperparameter Optimization through Reversible Learning, section 2.2.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SHIFT = 8
NUM_PARTS = 2**_SHIFT
"""A factor is a multiple of `1 / NUM_PARTS`."""
MOST_PARTS = 4 * NUM_PARTS
"""Parts of a factor below which the product with an integer of 53 bits fits 64 bits."""


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

    def combine(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the rounded product with the stream plus the rounded residual."""
        y: Tensor
        y, _ = _Combine.apply(x, residual, self, False)
        return y

    def combine_keeping(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what `combine` returns, and the lowest bits of the stream, packed into bytes; None for no bits."""
        y: Tensor
        kept: Tensor | None
        y, kept = _Combine.apply(x, residual, self, self.num_bits > 0)
        return y, kept

    def separate(self, y: Tensor, residual: Tensor) -> Tensor:
        """Undo `combine` if no bits are kept, so that the result can be differentiated."""
        x: Tensor = _Separate.apply(y, residual, self)
        return x

    def separate_kept(self, y: Tensor, residual: Tensor, kept: Tensor | None, *, in_place: bool) -> Tensor:
        """Undo `combine_keeping`."""
        scale = 2.0**self.fraction_bits
        rounded = _steps(y, y.dtype, scale).sub_(_steps(residual, y.dtype, scale))
        self._apply_sign(rounded)
        # The lowest integer with this rounded product.
        lowest = rounded.mul_(NUM_PARTS).sub_(NUM_PARTS // 2 - self.num_parts + 1)
        lowest = lowest.div_(self.num_parts, rounding_mode="floor")
        if kept is not None:
            bits = _unpack(kept, y.shape, self.num_bits)
            lowest += (bits - lowest) & (2**self.num_bits - 1)
        x = lowest.to(y.dtype).mul_(1 / scale)
        return y.copy_(x) if in_place else x

    def value(self, dtype: torch.dtype) -> float | Tensor:
        """Return the factor: a number, or a tensor if the sign is one."""
        sign = self.sign.to(dtype) if isinstance(self.sign, Tensor) else self.sign
        return sign * (self.num_parts / NUM_PARTS)

    def _apply_sign(self, steps: Tensor) -> None:
        if isinstance(self.sign, Tensor):
            steps.mul_(self.sign)
        elif self.sign < 0:
            steps.neg_()


class _Combine(torch.autograd.Function):
    """Round and add; gradients are as for `a x + residual`."""

    @staticmethod
    def forward(x: Tensor, residual: Tensor, factor: ExactFactor, keeps: bool) -> tuple[Tensor, Tensor | None]:
        scale = 2.0**factor.fraction_bits
        steps = _steps(x, x.dtype, scale)
        kept = _pack(steps, factor.num_bits) if keeps else None
        steps.mul_(factor.num_parts).add_(NUM_PARTS // 2).bitwise_right_shift_(_SHIFT)
        factor._apply_sign(steps)
        steps += _steps(residual, x.dtype, scale)
        # Integers know no NaN and no infinity, which plain arithmetic would pass on.
        return torch.add(steps.to(x.dtype).mul_(1 / scale), x + residual, alpha=0), kept

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, residual, factor, _ = inputs
        ctx.dtype, ctx.factor = residual.dtype, factor
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor.value(grads[0].dtype), grads[0].to(ctx.dtype), None, None


class _Separate(torch.autograd.Function):
    """Undo `_Combine`, if it keeps nothing; gradients are as for `(y - residual) / a`."""

    @staticmethod
    def forward(y: Tensor, residual: Tensor, factor: ExactFactor) -> Tensor:
        return factor.separate_kept(y, residual, None, in_place=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, residual, factor = inputs
        ctx.dtype, ctx.factor = residual.dtype, factor

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gradient = grads[0] / ctx.factor.value(grads[0].dtype)
        return gradient, -gradient.to(ctx.dtype), None


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
