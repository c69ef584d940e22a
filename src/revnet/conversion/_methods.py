"""Methods of conversion: how a converted block combines the streams with what the original block computes."""

import abc
import math
from dataclasses import dataclass, replace

from revnet._checks import describe, is_number
from revnet.coupling import AbstractCoupling, ExactScaled, FixedPoint, Scaled

Factors = tuple[float, float, float]
"""The factors `a`, `b` and `c` of a two-step scheme `x[n+1] = a x[n-1] + c x[n] + b h(x[n])`."""
_PARTS = 256
"""An exact coupling rounds `a` to a multiple of `1 / _PARTS`."""


class AbstractMethod(abc.ABC):
    """The interface of methods of conversion.

    A residual block computes `x[n+1] = x[n] + h(x[n])`. A converted block computes a two-step scheme with the same `h`:
    `x[n+1] = a x[n-1] + c x[n] + b h(x[n])`. At `a = 0`, it cannot be undone, and holds its input instead.
    """

    fraction_bits: int | None
    """Bits of the fraction of the streams in fixed-point arithmetic, which is undone exactly; None for floating
    point."""
    is_wide: bool
    """Whether fixed-point streams are float64, for values outside the range of float32."""

    @property
    @abc.abstractmethod
    def factors(self) -> Factors:
        """The factors `a`, `b` and `c`."""

    @abc.abstractmethod
    def between(self, other: "AbstractMethod", share: float) -> "AbstractMethod":
        """Return the method whose coefficients are this share of the way to another method of its class."""


@dataclass(frozen=True)
class Dr2Net(AbstractMethod):
    """Dual residual connections: `x[n+1] = beta x[n-1] + alpha x[n] + h(x[n])`.

    At `(alpha, beta) = (1, 0)`, the converted network is the original one, bit for bit. From there, a schedule moves
    `beta` up and `alpha` to `1 - beta` during fine-tuning.

    Memory: at `beta = 0`, the input of each block, as with checkpointing. Otherwise two streams, whatever the depth; in
    fixed-point arithmetic also up to 8 bits for each element and block, see `ExactScaled`.
    Time: one more forward pass of each block per update.
    Accuracy: without `fraction_bits`, errors grow by `1 / beta` per block where `alpha = 1 - beta`. In networks of 12
    blocks, `beta` below 0.5 needs `fraction_bits`.

    Args:
        alpha: Factor of the stream that the block reads.
        beta: Factor of the stream before it.
        fraction_bits: Bits of the fraction in fixed-point arithmetic, such as 14; None for floating point.
        is_wide: Whether fixed-point streams are float64.

    Raises:
        ValueError: A coefficient is not a finite number, or an argument does not fit fixed-point arithmetic.

    References:
        Zhao et al. (2024), Dr2Net: Dynamic Reversible Dual-Residual Networks for Memory-Efficient Finetuning.
    """

    alpha: float = 1.0
    beta: float = 0.0
    fraction_bits: int | None = None
    is_wide: bool = False

    def __post_init__(self) -> None:
        _check(self, alpha=self.alpha, beta=self.beta)

    @property
    def factors(self) -> Factors:
        """The factors `a`, `b` and `c`: `beta`, 1 and `alpha`."""
        return self.beta, 1.0, self.alpha

    def between(self, other: AbstractMethod, share: float) -> "Dr2Net":
        """Return the method with both coefficients moved by `share` of the way to another `Dr2Net`."""
        assert isinstance(other, Dr2Net)
        return replace(
            self, alpha=_between(self.alpha, other.alpha, share), beta=_between(self.beta, other.beta, share)
        )


@dataclass(frozen=True)
class Consistent(AbstractMethod):
    """The consistent family: `x[n+1] = a x[n-1] + (1 - a) x[n] + (1 + a) h(x[n])`.

    It stays closer to the original network than `Dr2Net`: `a = 0` is the original, bit for bit, and `a = 1` the
    midpoint rule.

    Memory: two streams, whatever the depth. In fixed-point arithmetic, which is the default, also up to 8 bits for each
    element and block: 2 at `a = 1/4`. At `a = 0`, the input of each block, as with checkpointing.
    Time: one more forward pass of each block per update.
    Accuracy: exact to the last bit with `fraction_bits`. Without, errors grow by `1 / |a|` per block.

    Args:
        a: Factor of the stream before the one that the block reads.
        fraction_bits: Bits of the fraction in fixed-point arithmetic; None for floating point.
        is_wide: Whether fixed-point streams are float64.

    Raises:
        ValueError: `a` is not a finite number, or an argument does not fit fixed-point arithmetic.
    """

    a: float = 0.25
    fraction_bits: int | None = 14
    is_wide: bool = False

    def __post_init__(self) -> None:
        _check(self, a=self.a)

    @property
    def factors(self) -> Factors:
        """The factors `a`, `b` and `c`: `a`, `1 + a` and `1 - a`."""
        return self.a, 1 + self.a, 1 - self.a

    def between(self, other: AbstractMethod, share: float) -> "Consistent":
        """Return the method with `a` moved by `share` of the way to the one of another `Consistent`."""
        assert isinstance(other, Consistent)
        return replace(self, a=_between(self.a, other.a, share))


@dataclass(frozen=True)
class Rewire(AbstractMethod):
    """The rewiring of a residual network: `x[n+1] = x[n-1] + h(x[n])`. It has no coefficients.

    The converted network is far from the original, and must be trained.

    Memory: two streams, whatever the depth.
    Time: one more forward pass of each block per update.
    Accuracy: errors do not grow. They are zero with `fraction_bits`.

    Args:
        fraction_bits: Bits of the fraction in fixed-point arithmetic, such as 14; None for floating point.
        is_wide: Whether fixed-point streams are float64.

    Raises:
        ValueError: An argument does not fit fixed-point arithmetic.

    References:
        Zhao et al. (2023), Re2TAL: Rewiring Pretrained Video Backbones for Reversible Temporal Action Localization.
    """

    fraction_bits: int | None = None
    is_wide: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def factors(self) -> Factors:
        """The factors `a`, `b` and `c`: 1, 1 and 0."""
        return 1.0, 1.0, 0.0

    def between(self, other: AbstractMethod, share: float) -> "Rewire":
        """Return the method itself, which has no coefficients."""
        return self


def coupling_of(method: AbstractMethod, *, is_whole: bool) -> AbstractCoupling | None:
    """Return the coupling of a method; None at `a = 0`, where a block is not invertible.

    Args:
        method: The method.
        is_whole: Whether the function is the whole block, `x + h(x)`, and not `h` alone.
    """
    a, b, c = method.factors
    if is_zero(method):
        return None
    scaled = Scaled(a, b, c - b if is_whole else c)
    return scaled if method.fraction_bits is None else ExactScaled(scaled, method.fraction_bits, method.is_wide)


def is_zero(method: AbstractMethod) -> bool:
    """Return whether `a` is 0, in fixed-point arithmetic after rounding to a multiple of 1/256."""
    a = method.factors[0]
    return a == 0 if method.fraction_bits is None else round(abs(a) * _PARTS) == 0


def _check(method: AbstractMethod, **coefficients: float) -> None:
    for name, value in coefficients.items():
        if not is_number(value) or not math.isfinite(value):
            raise ValueError(f"`{name}` (={describe(value)}) must be a finite number, such as 0.25.")
    if method.fraction_bits is not None:
        FixedPoint(method.fraction_bits, method.is_wide)
        coupling_of(method, is_whole=True)


def _between(start: float, end: float, share: float) -> float:
    return end if share == 1 else start + share * (end - start)
