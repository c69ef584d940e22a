"""The reversible block."""

from torch import nn

from revnet.coupling import AbstractCoupling, Additive
from revnet.functional import HalfBlock
from revnet.nn._abstract_block import AbstractReversibleBlock, check_coupling, check_functions

_ADDITIVE = Additive()


class ReversibleBlock(AbstractReversibleBlock):
    """Two residual functions, joined so that the input can be computed from the output.

    `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`; reversed, `x2 = y2 - g(y1)`, `x1 = y1 - f(x2)`. Called alone, the block keeps
    its output and rebuilds the rest in the backward pass; several in a row belong in a `ReversibleSequential`, which
    keeps only the last output.

    Args:
        f: The residual function of the first stream: called with `x2` and the further arguments, it returns a tensor of
            `x1`'s shape. It may contain anything (dropout, batch norm, other devices), but must not write over its
            input.
        g: The residual function of the second stream: called with `y1`, returns a tensor of `x2`'s shape.
        split_dim: The dimension along which a tensor input is split into `x1, x2`.
        coupling: How residuals join the streams: `Additive()`; `FixedPoint()` for a reversal that is exact to the last
            bit; `Affine()` for densities.

    Shape:
        x: a tensor, even along `split_dim`, for instance (B, C, H, W) with C even; or a pair of tensors. Output: the
            same.

    Raises:
        TypeError: `f` or `g` is no module, or `coupling` is none.

    References:
        Gomez et al. (2017), The Reversible Residual Network, equations 6 and 7.
    """

    def __init__(self, f: nn.Module, g: nn.Module, *, split_dim: int = 1, coupling: AbstractCoupling = _ADDITIVE):
        super().__init__()
        check_functions(f=f, g=g)
        check_coupling(coupling)
        self.f = f
        self.g = g
        self.coupling = coupling
        self.split_dim = split_dim

    def half_blocks(self, prefix: str = "") -> list[HalfBlock]:
        """The two residual functions in order; `prefix` names the block in errors ("blocks.3.")."""
        return [
            HalfBlock(self.f, 0, f"{prefix}f", coupling=self.coupling),
            HalfBlock(self.g, 1, f"{prefix}g", coupling=self.coupling),
        ]

    def extra_repr(self) -> str:
        """The options that differ from the default, for `repr`."""
        options = [f"split_dim={self.split_dim}"] if self.split_dim != 1 else []
        options += [f"coupling={self.coupling}"] if self.coupling != _ADDITIVE else []
        return ", ".join(options)
