"""The block of a momentum residual network."""

from torch import nn

from revnet.coupling import Momentum
from revnet.nn.blocks._velocity_block import AbstractVelocityBlock


class MomentumBlock(AbstractVelocityBlock):
    """Add a velocity to a residual block, which makes any residual function reversible at its full width.

    The streams are `(x, v)`. The block computes `v <- gamma v + (1 - gamma) f(x)` and `x <- x + v`. Its inverse is
    `x <- x - v` and `v <- (v - (1 - gamma) f(x)) / gamma`. To turn a residual network into a momentum network, replace
    its blocks and start from the streams `(x, torch.zeros_like(x))`. With a `gamma` close to 0 it computes what the
    residual network computes.

    Args:
        f: The residual function. It is called with `x` and the additional arguments, and returns a tensor with the
            shape of `x`.
        gamma: The share of its velocity that a block keeps, between 0 and 1.
        split_dim: The dimension along which a tensor input is split into `x, v`: 1 for the channels of images, -1 for
            the features of sequences. If you leave it out, it is 1, and a three-dimensional tensor is refused, because
            it may be (B, T, D) as well as (B, C, L).

    Shape:
        x: A pair of tensors of the same shape, or a tensor whose size along `split_dim` is even. Output: the same.

    Numerics:
        Reversal magnifies errors by `1 / gamma` in each block. See `revnet.coupling.Momentum`.

    Raises:
        TypeError: `f` is not a module, or `split_dim` is not an integer.
        ValueError: `gamma` is not between 0 and 1.

    References:
        Sander et al. (2021), Momentum Residual Neural Networks, equation 3.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import ReversibleSequential
        >>> from revnet.nn import MomentumBlock
        >>> model = ReversibleSequential(*[MomentumBlock(nn.Linear(4, 4)) for _ in range(2)])
        >>> x = torch.rand(3, 4)
        >>> y, velocity = model((x, torch.zeros_like(x)))
        >>> y.shape
        torch.Size([3, 4])
    """

    def __init__(self, f: nn.Module, *, gamma: float = 0.9, split_dim: int | None = None):
        super().__init__(f, Momentum(gamma), split_dim)
        self.gamma = gamma

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        options = [f"gamma={self.gamma:g}"]
        options += [] if self.has_default_split_dim else [f"split_dim={self.split_dim}"]
        return ", ".join(options)
