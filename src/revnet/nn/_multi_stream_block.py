"""A reversible block of more than two streams."""

from torch import nn

from revnet.coupling import AbstractCoupling, Additive
from revnet.functional import HalfBlock
from revnet.nn._abstract_block import AbstractReversibleBlock, check_coupling, check_functions

_ADDITIVE = Additive()


class MultiStreamBlock(AbstractReversibleBlock):
    """As many residual functions as streams, each updating its stream from the one before it.

    `y1 = x1 + f1(xn)`, `y2 = x2 + f2(y1)`, ..., `yn = xn + fn(yn-1)`; reversed, last to first. With two functions it is
    a `ReversibleBlock`. The more streams, the narrower each is, and the smaller the activations of a function, of which
    one at a time is rebuilt; but a function sees one stream only, so that it takes more blocks for all of them to mix.

    Args:
        functions: The residual functions, two or more: each is called with a stream and the further arguments, and
            returns a tensor of the next stream's shape.
        split_dim: The dimension along which a tensor input is split into streams.
        coupling: How residuals join the streams.

    Shape:
        x: a tensor whose size along `split_dim` the number of streams divides, or a tuple of so many tensors. Output:
            the same.

    Raises:
        TypeError: A function is no module, or `coupling` is none.
        ValueError: There are fewer than two functions.

    References:
        Gomez et al. (2017), The Reversible Residual Network, equations 6 and 7, for two.
    """

    def __init__(self, *functions: nn.Module, split_dim: int = 1, coupling: AbstractCoupling = _ADDITIVE):
        super().__init__()
        check_functions(**{f"functions[{index}]": function for index, function in enumerate(functions)})
        check_coupling(coupling)
        if len(functions) < 2:
            raise ValueError(
                f"`functions` are {len(functions)}, but must be two or more, one for each stream; `CouplingLayer` is "
                "the block of one function."
            )
        self.functions = nn.ModuleList(functions)
        self.num_streams = len(functions)
        self.split_dim = split_dim
        self.coupling = coupling

    def half_blocks(self, prefix: str = "") -> list[HalfBlock]:
        """The residual functions in order; `prefix` names the block in errors ("blocks.3.")."""
        return [
            HalfBlock(
                function,
                index,
                f"{prefix}functions.{index}",
                coupling=self.coupling,
                source=(index - 1) % self.num_streams,
            )
            for index, function in enumerate(self.functions)
        ]

    def extra_repr(self) -> str:
        """The options that differ from the default, for `repr`."""
        options = [f"split_dim={self.split_dim}"] if self.split_dim != 1 else []
        options += [f"coupling={self.coupling}"] if self.coupling != _ADDITIVE else []
        return ", ".join(options)
