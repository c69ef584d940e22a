"""Convolution padded as TensorFlow pads it."""

import torch.nn.functional as F
from torch import Tensor, nn


class Conv2dSame(nn.Conv2d):
    """A convolution whose output has size `ceil(input / stride)`, padded as TensorFlow's SAME pads.

    With stride 1 this is the usual centred padding. With stride 2 and an even input, a 3x3 kernel pads one pixel at the
    right and bottom and none at the left and top, where PyTorch's `padding=1` pads the left and top: the two see images
    shifted by a pixel. Networks whose reference was trained in TensorFlow need this one.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the square kernel.
        stride: Step of the kernel, the same in both directions.

    Shape:
        x: (B, C, H, W). Output: (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        # A 1x1 kernel needs no padding, and `F.pad` would copy the input, for autograd to hold, even so.
        centred = kernel_size == 1 or (stride == 1 and kernel_size % 2 == 1)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2 if centred else 0,
            bias=False,
        )
        self._centred = centred

    def forward(self, x: Tensor) -> Tensor:
        """Pad, and convolve."""
        if not self._centred:
            vertical = _same_padding(x.shape[-2], self.kernel_size[0], self.stride[0])
            horizontal = _same_padding(x.shape[-1], self.kernel_size[1], self.stride[1])
            x = F.pad(x, (*horizontal, *vertical))
        return super().forward(x)


def _same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Pixels to add before and after a side of `size`."""
    num_outputs = -(-size // stride)
    total = max((num_outputs - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2
