"""The block of a momentum residual network."""

from torch import nn

from revnet.coupling import Momentum
from revnet.functional import HalfBlock
from revnet.nn._abstract_block import AbstractReversibleBlock, check_functions


class MomentumBlock(AbstractReversibleBlock):
    """A residual block with a velocity, which makes any residual function reversible at its full width.

    `v <- gamma v + (1 - gamma) f(x)`, `x <- x + v`, on the streams `(x, v)`; reversed, `x <- x - v`,
    `v <- (v - (1 - gamma) f(x)) / gamma`. A residual network becomes one by exchanging its blocks, the streams being
    `(x, torch.zeros_like(x))` at first; with `gamma` near 0 it computes what that one does.

    Args:
        f: The residual function: called with `x` and the further arguments, returns a tensor of its shape.
        gamma: The share of its velocity that a block keeps, between 0 and 1.
        split_dim: The dimension along which a tensor input is split into `x, v`.

    Shape:
        x: a pair of tensors of one shape, or a tensor, even along `split_dim`. Output: the same.

    Numerics:
        Going back magnifies errors by `1 / gamma` at each block; see `revnet.coupling.Momentum`.

    Raises:
        TypeError: `f` is no module.
        ValueError: `gamma` is not between 0 and 1.

    References:
        Sander et al. (2021), Momentum Residual Neural Networks, equation 3.
    """

    def __init__(self, f: nn.Module, *, gamma: float = 0.9, split_dim: int = 1):
        super().__init__()
        check_functions(f=f)
        self.f = f
        self.step = nn.Identity()
        self.coupling = Momentum(gamma)
        self.split_dim = split_dim

    def half_blocks(self, prefix: str = "") -> list[HalfBlock]:
        """The velocity's update and the activation's; `prefix` names the block in errors ("blocks.3.")."""
        return [
            HalfBlock(self.f, 1, f"{prefix}f", coupling=self.coupling),
            HalfBlock(self.step, 0, f"{prefix}step"),
        ]

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        options = [f"gamma={self.coupling.gamma:g}"]
        options += [f"split_dim={self.split_dim}"] if self.split_dim != 1 else []
        return ", ".join(options)
