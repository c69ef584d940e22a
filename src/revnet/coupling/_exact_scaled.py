"""The scaled coupling in fixed-point arithmetic, which reverses exactly to the last bit."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from revnet._checks import describe
from revnet.coupling._check import check_residual, is_differentiated
from revnet.coupling._exact_factor import MOST_PARTS, NUM_PARTS, ExactFactor
from revnet.coupling._fixed_point import FixedPoint
from revnet.coupling._on_grid import AbstractGridCoupling
from revnet.coupling._scaled import Scaled, log_det_of_factor


@dataclass(frozen=True)
class ExactScaled(AbstractGridCoupling):
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

    scaled: Scaled
    fraction_bits: int = 14
    is_wide: bool = False
    _grid: FixedPoint = field(init=False, repr=False)
    factor: ExactFactor = field(init=False, repr=False)
    """`a`, rounded."""

    def __post_init__(self) -> None:
        if not isinstance(self.scaled, Scaled):
            raise TypeError(
                f"`scaled` (={describe(self.scaled)}) must be a `Scaled`, such as `Scaled.consistent(0.5)`."
            )
        object.__setattr__(self, "_grid", FixedPoint(self.fraction_bits, self.is_wide))
        num_parts = round(abs(self.scaled.a) * NUM_PARTS)
        if not 1 <= num_parts < MOST_PARTS:
            raise ValueError(
                f"`a` of `scaled` (={self.scaled.a:g}) must have a magnitude from 1/256 to below 4; use `Scaled` "
                "itself, which is not exact, or another factor."
            )
        sign = 1 if self.scaled.a > 0 else -1
        object.__setattr__(self, "factor", ExactFactor(num_parts, sign, self.fraction_bits))

    @property
    def a(self) -> float:
        """Factor of the stream that is updated, rounded to a multiple of 1/256."""
        return self.factor.sign * self.factor.num_parts / NUM_PARTS

    @property
    def _is_sum(self) -> bool:
        """Whether `a` is 1, so that `FixedPoint` computes the same."""
        return self.factor.num_parts * self.factor.sign == NUM_PARTS

    @property
    def num_bits(self) -> int:
        """Bits that are kept for each element: 0, 1, 2, 4 or 8."""
        return self.factor.num_bits

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

    def forward(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Return the rounded `a x` plus the rounded residual."""
        if self._is_sum:
            return self._grid.forward(x, residual, name)
        check_residual(x, residual, name)
        return self.factor.combine(x, residual)

    def forward_keeping(self, x: Tensor, residual: Tensor, name: str = "f") -> tuple[Tensor, Tensor | None]:
        """Return what `forward` returns, and the lowest bits of the stream, packed into bytes; None for no bits."""
        check_residual(x, residual, name)
        return self.factor.combine_keeping(x, residual)

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
        if self._is_sum:
            return self._grid.inverse(y, residual, name, in_place=in_place)
        if is_differentiated(y, residual):
            check_residual(y, residual, name)
            return self.factor.separate(y, residual)
        return self.inverse_kept(y, residual, None, name, in_place=in_place)

    def inverse_kept(
        self, y: Tensor, residual: Tensor, kept: Tensor | None, name: str = "f", *, in_place: bool = False
    ) -> Tensor:
        """Compute the stream from `y`, the residual and the bits that `forward_keeping` returned."""
        check_residual(y, residual, name)
        return self.factor.separate_kept(y, residual, kept, in_place=in_place)

    def log_det(self, x: Tensor, residual: Tensor) -> Tensor | None:
        """Return the number of elements per sample times `log |a|`; None if that is zero."""
        return None if abs(self.a) == 1 else log_det_of_factor(x, self.a)
