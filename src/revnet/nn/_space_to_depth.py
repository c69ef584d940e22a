"""Down-sampling that loses nothing: squares of pixels become channels."""

from torch import Tensor

from revnet.nn._invertible import AbstractInvertible, check_halvable, check_multiple, zero_log_det


class SpaceToDepth(AbstractInvertible):
    """Lay the pixels of each square one behind the other, as channels.

    Channels are ordered by place: first all channels of the square's first pixel, then all of the next one, as in
    TensorFlow's `space_to_depth` and the published i-RevNet. `torch.nn.PixelUnshuffle` orders them the other way, all
    pixels of the first channel first, so that halves of the channels would be other halves of the image.

    Args:
        block_size: Side of the squares.

    Shape:
        x: (B, C, H, W), sides divisible by `block_size`. Output: (B, C block_size^2, H / block_size, W / block_size).

    Raises:
        ValueError: `block_size` is no positive integer. In the passes: the shape cannot be divided.

    References:
        Jacobsen, Smeulders and Oyallon (2018), i-RevNet: Deep Invertible Networks, section 3.1.
    """

    def __init__(self, block_size: int = 2):
        super().__init__()
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise ValueError(f"`block_size` (={block_size!r}) must be a positive integer; 2 halves the image.")
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
        """The output, and zeros: nothing but places change."""
        return self(x), zero_log_det(x)

    def extra_repr(self) -> str:
        """The block size, for `repr`."""
        return f"block_size={self.block_size}"
