"""Pre-activation ResNets, the stored reference of the paper.

As the official code builds them: pre-activation blocks, and a shortcut without parameters (average pooling and zero
channels where the shape changes). B C H W: batch, channels, height, width.

References:
    He et al. (2016), Identity Mappings in Deep Residual Networks.
    Gomez et al. (2017), The Reversible Residual Network, table 2.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from revnet.models._checks import check_positive, check_stages
from revnet.models._registry import register_model
from revnet.nn import BatchNorm2dBiased, Conv2dSame


class BasicResidual(nn.Module):
    """The residual function of a basic block: twice BN, ReLU, 3x3 convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution.
        pre_activate: Whether to begin with BN and ReLU; the first block after the stem does not, the stem has just done
            so.

    Shape:
        x: (B, in_channels, H, W). Output: (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, pre_activate: bool = True):
        super().__init__()
        self.norm1 = batch_norm(in_channels) if pre_activate else None
        self.conv1 = Conv2dSame(in_channels, out_channels, 3, stride)
        self.norm2 = batch_norm(out_channels)
        self.conv2 = Conv2dSame(out_channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the residual of `x`."""
        if self.norm1 is not None:
            x = F.relu(self.norm1(x))
        x = self.conv1(x)
        x = F.relu(self.norm2(x))
        return self.conv2(x)


class PoolPadShortcut(nn.Module):
    """The shortcut where the shape changes: average pooling, then zero channels on both sides. It has no parameters.

    Shape:
        x: (B, in_channels, H, W). Output: (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        before = (out_channels - in_channels) // 2
        self.channel_padding = (before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        """Bring `x` to the shape of the residual."""
        if self.stride > 1:
            # Odd sizes, at which the official code fails, round up as the convolution does.
            x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        return F.pad(x, (0, 0, 0, 0, *self.channel_padding)) if any(self.channel_padding) else x


class ResidualBlock(nn.Module):
    """`y = shortcut(x) + residual(x)`, by ordinary autograd."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, pre_activate: bool = True):
        super().__init__()
        self.residual = BasicResidual(in_channels, out_channels, stride, pre_activate=pre_activate)
        self.shortcut = PoolPadShortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block's output."""
        return self.shortcut(x) + self.residual(x)


class ResNet(nn.Module):
    """A pre-activation ResNet for small images.

    Args:
        num_blocks: Blocks of each stage; every stage but the first halves the image.
        widths: Channels of the stem and of each stage.
        num_classes: Size of the output.
        in_channels: Channels of the input images.

    Shape:
        x: (B, in_channels, H, W), any H and W. Output: logits (B, num_classes).

    Raises:
        ValueError: A count is not positive, or `widths` does not fit `num_blocks`.
    """

    is_reversible = False

    def __init__(
        self, *, num_blocks: Sequence[int], widths: Sequence[int], num_classes: int = 10, in_channels: int = 3
    ):
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels)
        check_stages(num_blocks, widths)
        self.stem = nn.Sequential(Conv2dSame(in_channels, widths[0], 3), batch_norm(widths[0]), nn.ReLU())
        self.stages = nn.Sequential(
            *[
                nn.Sequential(
                    *[
                        ResidualBlock(
                            widths[stage] if block == 0 else widths[stage + 1],
                            widths[stage + 1],
                            stride=2 if stage > 0 and block == 0 else 1,
                            pre_activate=stage > 0 or block > 0,
                        )
                        for block in range(count)
                    ]
                )
                for stage, count in enumerate(num_blocks)
            ]
        )
        self.norm = batch_norm(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)
        initialize(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the features before pooling, (B, widths[-1], H', W')."""
        return F.relu(self.norm(self.stages(self.stem(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits."""
        return self.head(self.forward_features(x).mean((-2, -1)))


def initialize(model: nn.Module) -> None:
    """Initialise as the official code does.

    Convolutions: normal with deviation sqrt(2 / (k^2 out_channels)), cut at two deviations. Linear layers: uniform
    within sqrt(3 / in_features), bias zero. Batch norm: one and zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            deviation = math.sqrt(2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels))
            nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        elif isinstance(module, nn.Linear):
            bound = math.sqrt(3 / module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)


def batch_norm(num_channels: int) -> BatchNorm2dBiased:
    """Batch norm with the official code's constants: its moving average of 0.99 is PyTorch's momentum of 0.01."""
    return BatchNorm2dBiased(num_channels, eps=1e-3, momentum=0.01)


@register_model
def resnet32(*, num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-32 for CIFAR: 464,154 parameters for 10 classes."""
    return ResNet(num_blocks=(5, 5, 5), widths=(16, 16, 32, 64), num_classes=num_classes, in_channels=in_channels)
