"""Half a reversible block: one residual function."""

from typing import Literal

from torch import nn

from revnet._checks import describe, is_integer
from revnet.coupling import AbstractCoupling, Additive
from revnet.engine import HalfBlock
from revnet.nn.blocks._abstract_block import AbstractReversibleBlock, check_coupling, check_functions, reads
from revnet.nn.blocks._split_dim import choose_split_dim

_ADDITIVE = Additive()


class CouplingLayer(AbstractReversibleBlock):
    """Update one stream from the other: `y1 = x1 + f(x2)` and `y2 = x2`. This is the coupling layer of NICE.

    In a `ReversibleSequential`, layers that update the two streams alternately compute what half the number of
    two-function blocks computes. Use coupling layers in networks that have an odd number of functions, or other layers
    in between.

    Args:
        f: The residual function. It is called with the stream that stays and the additional arguments, and returns a
            tensor with the shape of the other stream.
        updates: The stream that the layer updates: 0 for the first, 1 for the second.
        split_dim: The dimension along which a tensor input is split into `x1, x2`: 1 for the channels of images, -1 for
            the features of sequences. If you leave it out, it is 1, and a three-dimensional tensor is refused, because
            it may be (B, T, D) as well as (B, C, L).
        coupling: How the residual is combined with the stream: `Additive()`, `FixedPoint()` or `Affine()`.

    Shape:
        x: A tensor whose size along `split_dim` is even, or a pair of tensors. Output: the same.

    Raises:
        TypeError: `f` is not a module, `split_dim` is not an integer, or `coupling` is not a coupling.
        ValueError: `updates` is neither 0 nor 1.

    References:
        Dinh, Krueger and Bengio (2015), NICE: Non-linear Independent Components Estimation, section 3.2.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet.nn import CouplingLayer
        >>> layer = CouplingLayer(nn.Linear(2, 2), updates=1)
        >>> x = torch.rand(3, 4)
        >>> torch.equal(layer(x)[:, :2], x[:, :2])  # the first stream stays
        True
    """

    def __init__(
        self,
        f: nn.Module,
        *,
        updates: Literal[0, 1] = 0,
        split_dim: int | None = None,
        coupling: AbstractCoupling = _ADDITIVE,
    ):
        super().__init__()
        check_functions(f=f)
        check_coupling(coupling)
        if not is_integer(updates) or updates not in (0, 1):
            raise ValueError(f"`updates` (={describe(updates)}) must be 0 for the first stream, or 1 for the second.")
        self.f = f
        self.updates = updates
        self.split_dim, self.has_default_split_dim = choose_split_dim(split_dim)
        self.coupling = coupling

    @reads("coupling", "updates", children=("f",))
    def half_blocks(self, prefix: str = "") -> list[HalfBlock]:
        """Return the residual function. `prefix`, such as "blocks.3.", names the layer in errors."""
        return [HalfBlock(self.f, self.updates, 1 - self.updates, prefix + "f", self.coupling)]

    def extra_repr(self) -> str:
        """Return the stream and the options that differ from the default, for `repr`."""
        options = [f"updates={self.updates}"]
        options += [] if self.has_default_split_dim else [f"split_dim={self.split_dim}"]
        options += [f"coupling={self.coupling}"] if self.coupling != _ADDITIVE else []
        return ", ".join(options)
