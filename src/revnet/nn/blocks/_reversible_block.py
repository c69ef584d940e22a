"""The reversible block."""

from torch import nn

from revnet.coupling import AbstractCoupling, Additive
from revnet.engine import HalfBlock
from revnet.nn.blocks._abstract_block import AbstractReversibleBlock, check_coupling, check_functions, reads
from revnet.nn.blocks._split_dim import choose_split_dim

_ADDITIVE = Additive()


class ReversibleBlock(AbstractReversibleBlock):
    """Combine two residual functions so that the input can be computed from the output.

    The block computes `y1 = x1 + f(x2)` and `y2 = x2 + g(y1)`. Its inverse is `x2 = y2 - g(y1)` and `x1 = y1 - f(x2)`.
    A block that is called alone keeps its output and rebuilds the rest in the backward pass. Put several blocks in a
    row into a `ReversibleSequential`, which keeps only the last output.

    Args:
        f: The residual function of the first stream. It is called with `x2` and the additional arguments, and returns a
            tensor with the shape of `x1`. It may contain anything, such as dropout or batch norm, but it must not
            modify its input.
        g: The residual function of the second stream. It is called with `y1` and the additional arguments, and returns
            a tensor with the shape of `x2`.
        split_dim: The dimension along which a tensor input is split into `x1, x2`: 1 for the channels of images, -1 for
            the features of sequences. If you leave it out, it is 1, and a three-dimensional tensor is refused, because
            it may be (B, T, D) as well as (B, C, L).
        coupling: How the residuals are combined with the streams. `FixedPoint()` makes the reversal exact to the last
            bit, and `Affine()` is for densities. A pair gives `f` and `g` couplings of their own.

    Shape:
        x: A tensor whose size along `split_dim` is even, such as (B, C, H, W) with an even C, or a pair of tensors.
        Output: the same.

    Raises:
        TypeError: `f` or `g` is not a module, `split_dim` is not an integer, or `coupling` is neither a coupling nor a
            pair of them. In the passes: the input is not a tensor or a pair.
        ValueError: In the passes: the input cannot be split along `split_dim`.

    References:
        Gomez et al. (2017), The Reversible Residual Network, equations 6 and 7.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import ReversibleBlock
        >>> block = ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> x = torch.rand(3, 4)
        >>> torch.allclose(block.inverse(block(x)), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        f: nn.Module,
        g: nn.Module,
        *,
        split_dim: int | None = None,
        coupling: AbstractCoupling | tuple[AbstractCoupling, AbstractCoupling] = _ADDITIVE,
    ):
        super().__init__()
        check_functions(f=f, g=g)
        for one in coupling if isinstance(coupling, tuple) and len(coupling) == 2 else (coupling,):
            check_coupling(one)
        self.f = f
        self.g = g
        self.coupling = coupling
        self.split_dim, self.has_default_split_dim = choose_split_dim(split_dim)

    @reads("coupling", children=("f", "g"))
    def half_blocks(self, prefix: str = "") -> list[HalfBlock]:
        """Return the two residual functions in order. `prefix`, such as "blocks.3.", names the block in errors."""
        of_f, of_g = self.coupling if isinstance(self.coupling, tuple) else (self.coupling, self.coupling)
        return [HalfBlock(self.f, 0, 1, prefix + "f", of_f, "f"), HalfBlock(self.g, 1, 0, prefix + "g", of_g, "g")]

    def extra_repr(self) -> str:
        """Return the options that differ from the default, for `repr`."""
        options = [] if self.has_default_split_dim else [f"split_dim={self.split_dim}"]
        options += [f"coupling={self.coupling}"] if self.coupling != _ADDITIVE else []
        return ", ".join(options)
