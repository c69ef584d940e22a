"""What a method means for one pass: the couplings, and which stream each function reads."""

from dataclasses import dataclass

from revnet.coupling import AbstractCoupling, ExactScaled, Scaled
from revnet.coupling._exact_factor import NUM_PARTS

Factors = tuple[float, float, float]
"""The factors `a`, `b` and `c` of a two-step scheme `x[n+1] = a x[n-1] + c x[n] + b h(x[n])`."""


@dataclass(frozen=True)
class Scheme:
    """The couplings of a pass through a row of blocks, and how its functions are wired.

    Two streams begin as the same tensor. In a two-step scheme, each function reads the stream that was updated last.
    """

    couplings: tuple[AbstractCoupling, ...]
    """Couplings of the functions of a block."""
    first: AbstractCoupling | None = None
    """Coupling of the first function of the row, if it differs."""
    adapter: str | None = None
    """Name of the child that is the second function of each block; None in a two-step scheme."""

    @property
    def num_functions(self) -> int:
        """Number of functions of a block."""
        return len(self.couplings)

    def coupling_of(self, number: int) -> AbstractCoupling:
        """Return the coupling of function `number` of the row."""
        if number == 0 and self.first is not None:
            return self.first
        return self.couplings[number % self.num_functions]

    def target_of(self, number: int) -> int:
        """Return the stream that function `number` of the row updates. It reads the other one."""
        if self.adapter is None:
            return number % 2
        # The streams change places after each block, so that a block reads what the block before has updated.
        return sum(divmod(number, 2)) % 2


def rounded(a: float, fraction_bits: int | None) -> float:
    """Return the factor `a` that the couplings compute with, from which a method derives the other factors."""
    return a if fraction_bits is None else round(a * NUM_PARTS) / NUM_PARTS


def two_step(factors: Factors, fraction_bits: int | None, is_wide: bool, num_branches: int | None) -> Scheme | Factors:
    """Return the scheme of a two-step method, or its factors at `a = 0`.

    Args:
        factors: The factors, of which `a` is rounded.
        fraction_bits: Bits of the fraction; None for floating point.
        is_wide: Whether fixed-point streams are float64.
        num_branches: Number of branches of a block; None if blocks are whole, so that a function is `x + h(x)`.
    """
    a, b, c = factors
    if a == 0:
        return factors
    if num_branches is None:
        return Scheme((scaled_coupling((a, b, c - b), fraction_bits, is_wide),))
    return Scheme((scaled_coupling(factors, fraction_bits, is_wide),) * num_branches)


def scaled_coupling(factors: Factors, fraction_bits: int | None, is_wide: bool) -> AbstractCoupling:
    """Return the coupling `y = a x + c s + b f(s)`."""
    scaled = Scaled(*factors)
    return scaled if fraction_bits is None else ExactScaled(scaled, fraction_bits, is_wide)
