"""The grouped reversible block of deep graph networks."""

from torch import nn

from revnet.coupling import AbstractCoupling, Additive
from revnet.engine import HalfBlock
from revnet.nn.blocks._abstract_block import AbstractReversibleBlock, check_coupling, check_functions, reads
from revnet.nn.blocks._split_dim import choose_split_dim

_ADDITIVE = Additive()


class GroupedBlock(AbstractReversibleBlock):
    """Update several streams in turn, the first from the sum of the others, and each other from the stream before it.

    The block computes `y1 = x1 + f1(x2 + ... + xn)`, `y2 = x2 + f2(y1)`, ..., `yn = xn + fn(yn-1)`. Its inverse runs
    from the last function to the first. With two functions the block is a `ReversibleBlock`. A `MultiStreamBlock`
    differs from it in its first function, which reads `xn` alone. Here all streams mix in a single block.

    Graph networks with up to a thousand layers use this block. The graph is an additional argument, such as
    `block(x, edge_index)`, which all functions receive whole.

    Args:
        functions: The residual functions, two or more, one for each stream. Each one is called with a stream, or the
            sum of the other streams, and the additional arguments, and returns a tensor with the shape of a stream.
        split_dim: The dimension along which a tensor input is split into streams: 1 for the channels of images and the
            features of nodes, -1 for the features of sequences. If you leave it out, it is 1, and a three-dimensional
            tensor is refused, because it may be (B, T, D) as well as (B, C, L).
        coupling: How the residuals are combined with the streams.

    Shape:
        x: A tensor whose size along `split_dim` is divisible by the number of streams, or a tuple of equal shapes, with
            one tensor for each stream. Output: the same.

    Raises:
        TypeError: A function is not a module, `split_dim` is not an integer, or `coupling` is not a coupling.
        ValueError: There are fewer than two functions.

    References:
        Li et al. (2021), Training Graph Neural Networks with 1000 Layers, section 3.2.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet.nn import GroupedBlock
        >>> block = GroupedBlock(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        >>> nodes = torch.rand(5, 6)
        >>> torch.allclose(block.inverse(block(nodes)), nodes, atol=1e-5)
        True
    """

    def __init__(self, *functions: nn.Module, split_dim: int | None = None, coupling: AbstractCoupling = _ADDITIVE):
        super().__init__()
        check_functions(**{f"functions[{index}]": function for index, function in enumerate(functions)})
        check_coupling(coupling)
        if len(functions) < 2:
            raise ValueError(
                f"`functions` (={len(functions)} of them) must be two or more, one for each stream; use "
                "`CouplingLayer` for a block of one function."
            )
        self.functions = nn.ModuleList(functions)
        self.num_streams = len(functions)
        self.split_dim, self.has_default_split_dim = choose_split_dim(split_dim)
        self.coupling = coupling

    @reads("coupling", list_name="functions")
    def half_blocks(self, prefix: str = "") -> list[HalfBlock]:
        """Return the residual functions in order. `prefix`, such as "blocks.3.", names the block in errors."""
        others = tuple(range(1, self.num_streams))
        return [
            HalfBlock(
                function,
                index,
                index - 1 if index else others if len(others) > 1 else 1,
                f"{prefix}functions.{index}",
                self.coupling,
                f"functions.{index}",
            )
            for index, function in enumerate(self.functions)
        ]

    def extra_repr(self) -> str:
        """Return the options that differ from the default, for `repr`."""
        options = [] if self.has_default_split_dim else [f"split_dim={self.split_dim}"]
        options += [f"coupling={self.coupling}"] if self.coupling != _ADDITIVE else []
        return ", ".join(options)
