"""Half a reversible block: one residual function."""

from typing import Literal

from torch import nn

from revnet.coupling import AbstractCoupling, Additive
from revnet.functional import HalfBlock
from revnet.nn._abstract_block import AbstractReversibleBlock, check_coupling, check_functions

_ADDITIVE = Additive()


class CouplingLayer(AbstractReversibleBlock):
    """One residual function: `y1 = x1 + f(x2)`, and `y2 = x2`; the coupling layer of NICE and its successors.

    In a `ReversibleSequential`, layers that update the first stream and the second in turns do what half as many
    blocks of two functions do. Take them where a network has an odd number of functions, or other layers in between.

    Args:
        f: The residual function: called with the stream that stays and the further arguments, it returns a tensor of
            the shape of the other stream.
        updates: The stream that it updates, 0 for the first or 1 for the second.
        split_dim: The dimension along which a tensor input is split into `x1, x2`.
        coupling: How the residual joins the stream: `Additive()`, `FixedPoint()` or `Affine()`.

    Shape:
        x: a tensor, even along `split_dim`, or a pair of tensors. Output: the same.

    Raises:
        TypeError: `f` is no module, or `coupling` is none.
        ValueError: `updates` is neither 0 nor 1.

    References:
        Dinh, Krueger and Bengio (2015), NICE: Non-linear Independent Components Estimation, section 3.2.
    """

    def __init__(
        self,
        f: nn.Module,
        *,
        updates: Literal[0, 1] = 0,
        split_dim: int = 1,
        coupling: AbstractCoupling = _ADDITIVE,
    ):
        super().__init__()
        check_functions(f=f)
        check_coupling(coupling)
        if updates not in (0, 1):
            raise ValueError(f"`updates` (={updates!r}) must be 0 for the first stream, or 1 for the second.")
        self.f = f
        self.updates = updates
        self.split_dim = split_dim
        self.coupling = coupling

    def half_blocks(self, prefix: str = "") -> list[HalfBlock]:
        """The one residual function; `prefix` names the layer in errors ("blocks.3.")."""
        return [HalfBlock(self.f, self.updates, f"{prefix}f", coupling=self.coupling)]

    def extra_repr(self) -> str:
        """The stream, and the options that differ from the default, for `repr`."""
        options = [f"updates={self.updates}"]
        options += [f"split_dim={self.split_dim}"] if self.split_dim != 1 else []
        options += [f"coupling={self.coupling}"] if self.coupling != _ADDITIVE else []
        return ", ".join(options)
