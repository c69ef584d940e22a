"""Methods of conversion: how a converted block combines the streams with what the original block computes."""

import abc
import math
from dataclasses import dataclass, replace

from revnet import coupling as couplings
from revnet._checks import check_bool, describe, is_number
from revnet.conversion._scheme import Factors, Scheme, rounded, scaled_coupling, two_step
from revnet.coupling import FixedPoint
from revnet.coupling._exact_factor import NUM_PARTS


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

    @abc.abstractmethod
    def scheme(self, num_branches: int | None) -> Scheme | Factors:
        """Return the scheme of a pass. At `a = 0`, return the factors, because a block is not invertible there.

        Args:
            num_branches: Number of branches of a block; None if blocks are whole.
        """

    @abc.abstractmethod
    def between(self, other: "AbstractMethod", share: float) -> "AbstractMethod":
        """Return the method whose coefficients are this share of the way to another method of its class."""


@dataclass(frozen=True)
class Dr2Net(AbstractMethod):
    """Dual residual connections: `x[n+1] = beta x[n-1] + alpha x[n] + h(x[n])`.

    At `(alpha, beta) = (1, 0)`, the converted network is the original one, bit for bit. From there, a schedule moves
    `beta` up and `alpha` to `1 - beta` during fine-tuning.

    In fixed-point arithmetic, `beta` is rounded to a multiple of 1/256, and `alpha` takes the difference. If `beta` is
    rounded to 0 and `alpha` is 1 or `1 - beta`, the network is the original one.

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

    def scheme(self, num_branches: int | None) -> Scheme | Factors:
        """Return the scheme of a pass; at `a = 0` the factors."""
        beta = rounded(self.beta, self.fraction_bits)
        # Their sum decides how fast streams grow, so `alpha` takes what `beta` loses.
        alpha = self.alpha + (self.beta - beta)
        if beta == 0 != self.beta and abs(alpha - 1) <= 0.5 / NUM_PARTS:
            alpha = 1.0  # The original network, but for the rounding.
        return two_step((beta, 1.0, alpha), self.fraction_bits, self.is_wide, num_branches)

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
    midpoint rule. In fixed-point arithmetic, `a` is first rounded to a multiple of 1/256, in all three factors.

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

    def scheme(self, num_branches: int | None) -> Scheme | Factors:
        """Return the scheme of a pass; at `a = 0` the factors."""
        a = rounded(self.a, self.fraction_bits)
        return two_step((a, 1 + a, 1 - a), self.fraction_bits, self.is_wide, num_branches)

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

    def scheme(self, num_branches: int | None) -> Scheme | Factors:
        """Return the scheme of a pass; at `a = 0` the factors."""
        return two_step((1.0, 1.0, 0.0), self.fraction_bits, self.is_wide, num_branches)

    def between(self, other: AbstractMethod, share: float) -> "Rewire":
        """Return the method itself, which has no coefficients."""
        return self


@dataclass(frozen=True)
class BDIA(AbstractMethod):
    """Bidirectional integration: `x[n+1] = g x[n-1] + (1 - g) x[n] + (1 + g) h(x[n])`, with a random `g` in training.

    Each sample of each block draws `g` from `size` and `-size` in training mode. In evaluation mode, `g` is 0, so the
    network is the original one, rounded to the grid of fixed-point numbers.

    Memory: in training mode, two streams, and for each element and block 1 bit at a size of 1/2, 2 bits at 1/4. In
    evaluation mode with gradients, the input of each block.
    Time: one more forward pass of each block per update.
    Accuracy: exact to the last bit, relative to its stored twin.

    Args:
        size: The magnitude of `g`.
        fraction_bits: Bits of the fraction of the streams.
        is_wide: Whether streams are float64.

    Raises:
        TypeError: `is_wide` is not a bool.
        ValueError: An argument is out of range.

    References:
        Zhang et al. (2024), On Exact Bit-level Reversible Transformers Without Changing Architectures.
    """

    size: float = 0.25
    fraction_bits: int = 14
    is_wide: bool = False

    def __post_init__(self) -> None:
        self._coupling()

    def _coupling(self) -> couplings.BDIA:
        return couplings.BDIA(self.size, self.fraction_bits, self.is_wide)

    def scheme(self, num_branches: int | None) -> Scheme:
        """Return the scheme of a pass."""
        if num_branches is not None:
            coupling = self._coupling()
            return Scheme((coupling,) * num_branches, first=coupling.grid)
        # Both streams begin as the same tensor, so `x - s` of the first block is 0.
        first = scaled_coupling((1.0, 1.0, -1.0), self.fraction_bits, self.is_wide)
        return Scheme((replace(self._coupling(), is_whole=True),), first=first)

    def between(self, other: AbstractMethod, share: float) -> "BDIA":
        """Return the method with `size` moved by `share` of the way to the one of another `BDIA`."""
        assert isinstance(other, BDIA)
        return replace(self, size=_between(self.size, other.size, share))


@dataclass(frozen=True)
class Adapter(AbstractMethod):
    """MEFT: each block and an adapter next to it form a reversible pair, `y1 = a x1 + block(x2)`, `y2 = b x2 + g(y1)`.

    Then the streams change places, and the host sees their mean. The adapter `g` is a child of the block, which takes
    and returns a tensor of the shape of the stream and which the block itself does not call. For instance,
    `block.adapter = nn.Sequential(nn.Linear(d, 16), nn.ReLU(), nn.Linear(16, d))`.

    The converted network is not the original one: the mean keeps `b` of the stream before. It was made for networks
    that normalize after each addition, and starts far off in others.

    Memory: two streams, and in fixed-point arithmetic up to 8 bits for each element and function: 4 at 0.1.
    Time: one more forward pass of each block per update.
    Accuracy: exact to the last bit with `fraction_bits`. Without, errors grow by `1 / a` and `1 / b` per block.

    Args:
        name: Name of the adapter in each block.
        a: Factor of the stream that the block updates.
        b: Factor of the stream that the adapter updates.
        fraction_bits: Bits of the fraction in fixed-point arithmetic; None for floating point.
        is_wide: Whether fixed-point streams are float64.

    Raises:
        TypeError: `name` is not a string.
        ValueError: A factor is out of range, or an argument does not fit fixed-point arithmetic.

    References:
        Liao, Tan and Monz (2023), Make Pre-trained Model Reversible: From Parameter to Memory Efficient Fine-Tuning.
    """

    name: str = "adapter"
    a: float = 0.1
    b: float = 1.0
    fraction_bits: int | None = 14
    is_wide: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"`name` (={describe(self.name)}) must be the name of a child of each block.")
        for name, value in {"a": self.a, "b": self.b}.items():
            if not is_number(value) or not 2**-8 <= abs(value) < 4:
                raise ValueError(
                    f"`{name}` (={describe(value)}) must have a magnitude from 1/256 to below 4, so that its stream is "
                    "not lost; 0.1 is usual."
                )
        _check(self)

    def scheme(self, num_branches: int | None) -> Scheme:
        """Return the scheme of a pass.

        Raises:
            ValueError: The blocks have branches.
        """
        if num_branches is not None:
            raise ValueError("`branches` must be None for `Adapter`, which takes blocks as a whole.")
        of_pair = [scaled_coupling((f, 1.0, 0.0), self.fraction_bits, self.is_wide) for f in (self.a, self.b)]
        return Scheme(tuple(of_pair), adapter=self.name)

    def between(self, other: AbstractMethod, share: float) -> "Adapter":
        """Return the method with both factors moved by `share` of the way to another `Adapter`."""
        assert isinstance(other, Adapter)
        return replace(self, a=_between(self.a, other.a, share), b=_between(self.b, other.b, share))


def _check(method: AbstractMethod, **coefficients: float) -> None:
    for name, value in coefficients.items():
        if not is_number(value) or not math.isfinite(value):
            raise ValueError(f"`{name}` (={describe(value)}) must be a finite number, such as 0.25.")
    check_bool(is_wide=method.is_wide)
    if method.fraction_bits is not None:
        FixedPoint(method.fraction_bits, method.is_wide)
        method.scheme(None)


def _between(start: float, end: float, share: float) -> float:
    return float(end) if share == 1 else float(start + share * (end - start))
