"""Downsampling without loss, by turning squares of pixels into channels."""

from torch import Tensor

from revnet._checks import check_count
from revnet.nn.invertible._abstract_invertible import AbstractInvertible, check_halvable, check_multiple, zero_log_det


class SpaceToDepth(AbstractInvertible):
    """Turn squares of pixels into channels.

    Channels are ordered by position: first all channels of the first pixel of a square, then all channels of the next
    pixel, as in TensorFlow's `space_to_depth` and the published i-RevNet. `torch.nn.PixelUnshuffle` uses another order,
    with all pixels of the first channel first, so splitting the channels in two would split the image differently.

    Args:
        block_size: Side of the squares.

    Shape:
        x: (B, C, H, W) with sides divisible by `block_size`. Output: (B, C block_size^2, H / block_size,
        W / block_size).

    Raises:
        ValueError: `block_size` is not a positive integer. In the passes: the input has a shape that does not fit.
        TypeError: In the passes: the input is not a tensor.

    References:
        Jacobsen, Smeulders and Oyallon (2018), i-RevNet: Deep Invertible Networks, section 3.1.

    Example:
        >>> import torch
        >>> from revnet.nn import SpaceToDepth
        >>> SpaceToDepth()(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 12, 4, 4])
    """

    def __init__(self, block_size: int = 2):
        super().__init__()
        check_count("block_size", block_size, most=2**15, hint="2 halves the image")
        self.block_size = block_size

    def forward(self, x: Tensor) -> Tensor:
        """Turn squares of pixels into channels."""
        side = self.block_size
        check_halvable(x, side)
        B, C, H, W = x.shape
        squares = x.reshape(B, C, H // side, side, W // side, side)
        return squares.permute(0, 3, 5, 1, 2, 4).reshape(B, side**2 * C, H // side, W // side)

    def inverse(self, y: Tensor) -> Tensor:
        """Turn channels back into squares of pixels."""
        side = self.block_size
        check_multiple(y, side**2)
        B, C, H, W = y.shape
        squares = y.reshape(B, side, side, C // side**2, H, W)
        return squares.permute(0, 3, 4, 1, 5, 2).reshape(B, C // side**2, H * side, W * side)

    def forward_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, and zeros, because volumes do not change."""
        return self(x), zero_log_det(x)

    def extra_repr(self) -> str:
        """Return the block size, for `repr`."""
        return f"block_size={self.block_size}"
