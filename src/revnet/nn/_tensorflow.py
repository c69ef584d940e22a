"""Layers that compute what TensorFlow computes, for networks whose reference was trained there."""

import torch.nn.functional as F
from torch import Tensor, nn

from revnet._checks import MOST_CHANNELS, check_count, check_tensor
from revnet.engine._self_contained import self_contained

_MOST_PIXELS = 2**15
"""Largest kernel and stride."""


@self_contained
class Conv2dSame(nn.Conv2d):
    """Convolution whose output has size `ceil(input / stride)`, padded like TensorFlow's SAME.

    With stride 1 this is the usual centered padding. With stride 2, a 3x3 kernel and an even input, it pads one pixel
    at the right and bottom. PyTorch's `padding=1` pads the left and top as well, so the two see images that are shifted
    by a pixel. Networks whose reference was trained in TensorFlow need this convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the square kernel.
        stride: Step of the kernel in both directions.

    Shape:
        x: (B, in_channels, H, W). Output: (B, out_channels, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: An argument is not a positive integer.
        TypeError: In the forward pass: `x` is not a tensor.

    Example:
        >>> import torch
        >>> from revnet.nn import Conv2dSame
        >>> Conv2dSame(3, 8, kernel_size=3, stride=2)(torch.rand(1, 3, 9, 9)).shape
        torch.Size([1, 8, 5, 5])
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        check_count("in_channels", in_channels, most=MOST_CHANNELS)
        check_count("out_channels", out_channels, most=MOST_CHANNELS)
        check_count("kernel_size", kernel_size, most=_MOST_PIXELS, hint="the kernel is square")
        check_count("stride", stride, most=_MOST_PIXELS, hint="it is the same in both directions")
        # A 1x1 kernel needs no padding. `F.pad` would copy the input even then, and autograd would hold the copy.
        centered = kernel_size == 1 or (stride == 1 and kernel_size % 2 == 1)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2 if centered else 0,
            bias=False,
        )
        self._centered = centered

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve `x`."""
        if not isinstance(x, Tensor):
            check_tensor("x", x)
        if not self._centered:
            if x.dim() < 3:
                raise ValueError(
                    f"`x` (of shape {tuple(x.shape)}) must be (B, {self.in_channels}, H, W), a batch of images."
                )
            vertical = _same_padding(x.shape[-2], self.kernel_size[0], self.stride[0])
            horizontal = _same_padding(x.shape[-1], self.kernel_size[1], self.stride[1])
            x = F.pad(x, (*horizontal, *vertical))
        return super().forward(x)


def _same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Return the pixels to add before and after a side of `size`."""
    num_outputs = -(-size // stride)
    total = max((num_outputs - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2
