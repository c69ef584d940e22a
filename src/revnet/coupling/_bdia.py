"""The coupling of bidirectional integration, which is exact, and an ordinary residual network at inference."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from revnet._checks import check_bool, describe, is_number
from revnet.coupling._abstract import AbstractCoupling
from revnet.coupling._check import check_residual
from revnet.coupling._exact_factor import NUM_PARTS, ExactFactor
from revnet.coupling._fixed_point import FixedPoint
from revnet.coupling._on_grid import AbstractGridCoupling
from revnet.coupling._scaled import log_det_of_factor


@dataclass(frozen=True)
class BDIA(AbstractGridCoupling):
    """Bidirectional integration: `x[n+1] = g x[n-1] + (1 - g) x[n] + (1 + g) f(x[n])` with a random `g`, exactly.

    In training mode, each sample of each residual function draws its `g` from `size` and `-size`. In evaluation mode,
    `g` is 0, so the network is the ordinary residual network `x[n+1] = x[n] + f(x[n])`, on the grid of `FixedPoint`.
    The mode is the one of the residual function.

    A network starts from two copies of its input, and its first residual function is ordinary:
    `ReversibleBlock(f, g, coupling=(FixedPoint(), BDIA()))` for the first block and `ReversibleBlock(f, g,
    coupling=BDIA())` for all others.

    Accuracy: like `FixedPoint()`, including the range of the streams. In training mode, gradients equal the ones of the
    stored twin bit for bit.
    Memory: in training mode, 1 bit for each element of the updated stream and each function for a size of 1/2 or more,
    2 bits from 1/4 on, 4 from 1/16 on, and 8 below, plus one byte for each sample. In evaluation mode, nothing of the
    updated stream is left in the result, so a backward pass holds this stream, like `Checkpoint()`.

    Args:
        size: The magnitude of `g`, from 1/256 to below 1. It is rounded to a multiple of 1/256.
        fraction_bits: See `FixedPoint`.
        is_wide: See `FixedPoint`.
        is_whole: Whether the functions return their input plus the residual, as whole blocks of a residual network do.

    Raises:
        TypeError: `is_wide` or `is_whole` is not a bool.
        ValueError: `size` or `fraction_bits` is out of range.

    References:
        Zhang et al. (2024), On Exact Bit-level Reversible Transformers Without Changing Architectures.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import FixedPoint, ReversibleBlock, ReversibleSequential
        >>> from revnet.coupling import BDIA
        >>> f = [nn.Linear(4, 4) for _ in range(4)]
        >>> first = ReversibleBlock(f[0], f[1], coupling=(FixedPoint(), BDIA()))
        >>> second = ReversibleBlock(f[2], f[3], coupling=BDIA())
        >>> model, x = ReversibleSequential(first, second).eval(), torch.rand(3, 4)
        >>> _, y = model((x, x))
        >>> for function in f:
        ...     x = x + function(x)
        >>> torch.allclose(y, x, atol=1e-3)
        True
    """

    is_additive: ClassVar[bool] = False
    is_linear: ClassVar[bool] = True

    size: float = 0.5
    fraction_bits: int = 14
    is_wide: bool = False
    is_whole: bool = False
    _grid: FixedPoint = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not is_number(self.size) or not 1 <= round(self.size * NUM_PARTS) < NUM_PARTS:
            raise ValueError(
                f"`size` (={describe(self.size)}) must be a number from 1/256 to below 1; 0.5 is usual, and 0.25 stays "
                "closer to the ordinary network."
            )
        check_bool(is_whole=self.is_whole)
        object.__setattr__(self, "_grid", FixedPoint(self.fraction_bits, self.is_wide))

    @property
    def num_bits(self) -> int:
        """Bits that are kept for each element in training mode: 1, 2, 4 or 8."""
        return self._factor_with(1).num_bits

    def _factor_with(self, sign: int | Tensor) -> ExactFactor:
        """Return `g` with the given sign, or with the sign of each sample."""
        return ExactFactor(round(self.size * NUM_PARTS), sign, self.fraction_bits)

    @property
    def draws(self) -> bool:
        """Whether each call uses what `drawn` returns."""
        return True

    def drawn(self, x: Tensor, *, training: bool) -> AbstractCoupling:
        """Return the coupling of one call: with signs that are drawn in training mode, otherwise this coupling."""
        if not training:
            return self
        signs = torch.randint(0, 2, x.shape[:1], dtype=torch.int8, device=x.device).mul_(2).sub_(1)
        return _Drawn(self, signs.view(-1, *[1] * (x.dim() - 1)) if x.dim() else signs)

    @property
    def remembers(self) -> bool:
        """Whether the inverse needs something of the stream that the forward pass keeps."""
        return True

    @property
    def mixes(self) -> bool:
        """Whether the stream that the function reads is added to the residual."""
        return True

    def mix(self, source: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Return `s + f(s)`, which a whole block returns itself."""
        check_residual(source, residual, name)
        return residual if self.is_whole else source + residual

    def forward(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Return the rounded residual, which `mix` has returned. Nothing of `x` remains."""
        check_residual(x, residual, name)
        return self._grid.prepare(residual.to(x.dtype))

    def forward_keeping(self, x: Tensor, residual: Tensor, name: str = "f") -> tuple[Tensor, Tensor | None]:
        """Return what `forward` returns, and the stream itself."""
        return self.forward(x, residual, name), x.detach()

    def inverse(self, y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
        """Raise, because the stream cannot be computed from `y`.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"the inverse of `{name}` needs what {self} keeps in the forward pass; only the backward pass has it. Use "
            "`FixedPoint()` or `Scaled(a=1)`, which can be inverted."
        )

    def inverse_kept(
        self, y: Tensor, residual: Tensor, kept: Tensor | None, name: str = "f", *, in_place: bool = False
    ) -> Tensor:
        """Return the stream that `forward_keeping` kept."""
        assert kept is not None
        return kept.detach()  # Another tensor of the same memory, so that no one overwrites it.

    def log_det(self, x: Tensor, residual: Tensor) -> Tensor | None:
        """Raise, because the map is not invertible.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{self} has no log-determinant in evaluation mode, because it cannot be inverted there.")


class _Drawn(BDIA):
    """The coupling of one call in training mode.

    Args:
        coupling: The coupling that has drawn.
        signs: The sign of `g` for each sample, of a shape that broadcasts to the stream.
    """

    is_additive = False
    is_linear = True

    def __init__(self, coupling: BDIA, signs: Tensor):
        super().__init__(coupling.size, coupling.fraction_bits, coupling.is_wide, coupling.is_whole)
        self.__dict__["_factor"] = self._factor_with(signs)

    _factor: ExactFactor
    __eq__, __hash__ = object.__eq__, object.__hash__

    def __repr__(self) -> str:
        return repr(BDIA(self.size, self.fraction_bits, self.is_wide, self.is_whole))

    def mix(self, source: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Return `(1 - g) s + (1 + g) f(s)`."""
        check_residual(source, residual, name)
        share = self._factor.value(source.dtype)
        # A whole block returns `s + f(s)`, so `1 + g` times `s` is already in the residual.
        return source * (-2 * share if self.is_whole else 1 - share) + residual * (1 + share)

    def forward(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Return the rounded `g x` plus the rounded residual."""
        check_residual(x, residual, name)
        return self._factor.combine(x, residual)

    def forward_keeping(self, x: Tensor, residual: Tensor, name: str = "f") -> tuple[Tensor, Tensor | None]:
        """Return what `forward` returns, and the lowest bits of the stream, packed into bytes."""
        check_residual(x, residual, name)
        return self._factor.combine_keeping(x, residual)

    def inverse_kept(
        self, y: Tensor, residual: Tensor, kept: Tensor | None, name: str = "f", *, in_place: bool = False
    ) -> Tensor:
        """Compute the stream from `y`, the residual and the bits that `forward_keeping` returned."""
        check_residual(y, residual, name)
        return self._factor.separate_kept(y, residual, kept, in_place=in_place)

    def log_det(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the number of elements per sample times the logarithm of `size`, rounded as in the forward pass."""
        return log_det_of_factor(x, self._factor.num_parts / NUM_PARTS)
