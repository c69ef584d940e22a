"""A reversible block of more than two streams."""

from revnet.nn.blocks._list_block import AbstractListBlock


class MultiStreamBlock(AbstractListBlock):
    """Update several streams in turn, each by its own residual function of the stream before it.

    The block computes `y1 = x1 + f1(xn)`, `y2 = x2 + f2(y1)`, ..., `yn = xn + fn(yn-1)`. Its inverse runs from the last
    function to the first. With two functions the block is a `ReversibleBlock`. With more streams each stream is
    narrower, and so are the activations of a function, of which only one at a time is rebuilt. But a function sees
    only one stream, so more blocks are needed to mix all streams.

    Args:
        functions: The residual functions, two or more. Each one is called with a stream and the additional arguments,
            and returns a tensor with the shape of the next stream.
        split_dim: The dimension along which a tensor input is split into streams: 1 for the channels of images, -1 for
            the features of sequences. If you leave it out, it is 1, and a three-dimensional tensor is refused, because
            it may be (B, T, D) as well as (B, C, L).
        coupling: How the residuals are combined with the streams.

    Shape:
        x: A tensor whose size along `split_dim` is divisible by the number of streams, or a tuple with one tensor for
            each stream. Output: the same.

    Raises:
        TypeError: A function is not a module, `split_dim` is not an integer, or `coupling` is not a coupling.
        ValueError: There are fewer than two functions.

    References:
        Gomez et al. (2017), The Reversible Residual Network, equations 6 and 7, for two.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet.nn import MultiStreamBlock
        >>> block = MultiStreamBlock(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        >>> block(torch.rand(3, 6)).shape
        torch.Size([3, 6])
    """

    @staticmethod
    def _source(index: int, num_streams: int) -> int:
        """Return the stream before."""
        return (index - 1) % num_streams
