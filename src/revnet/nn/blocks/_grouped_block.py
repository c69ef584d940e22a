"""The grouped reversible block of deep graph networks."""

from revnet.nn.blocks._list_block import AbstractListBlock


class GroupedBlock(AbstractListBlock):
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

    @staticmethod
    def _source(index: int, num_streams: int) -> int | tuple[int, ...]:
        """Return the stream before, or for the first function all other streams."""
        others = tuple(range(1, num_streams))
        return index - 1 if index else others if len(others) > 1 else 1
