"""Pre-activation ResNets, the baseline of the paper.

The networks follow the official code: pre-activation blocks, basic for depths 32 and 110, bottlenecks otherwise. Where
the shape changes, the shortcut of a basic block is average pooling and zero padding of the channels, without
parameters, and the shortcut of a bottleneck is a convolution. B C H W: batch, channels, height, width.

References:
    He et al. (2016), Identity Mappings in Deep Residual Networks.
    Gomez et al. (2017), The Reversible Residual Network, table 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from revnet._checks import MOST_CHANNELS, check_choice, check_count
from revnet.engine._self_contained import self_contained
from revnet.models._checks import check_num_classes, check_stages
from revnet.models._image_classifier import AbstractImageClassifier, make_head
from revnet.models._initialize import initialize
from revnet.models._registry import register_model
from revnet.nn import AbstractModulePolicy, BatchNorm2dBiased, Conv2dSame, PolicySequential, Store
from revnet.nn.policies._has_policies import HasSinglePolicy, PolicyUnit

BlockName = Literal["basic", "bottleneck"]
StemName = Literal["small", "large"]


@self_contained
class BasicResidual(nn.Module):
    """The residual function of a basic block: BN, ReLU and 3x3 convolution, twice.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution.
        pre_activate: Whether to start with BN and ReLU. False for the first block, since the stem ends with them.

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
        """Return the residual of `x`."""
        if self.norm1 is not None:
            x = F.relu(self.norm1(x))
        x = self.conv1(x)
        x = F.relu(self.norm2(x))
        return self.conv2(x)


@self_contained
class BottleneckResidual(nn.Module):
    """The residual function of a bottleneck: BN, ReLU and convolution, with kernels 1x1, 3x3 and 1x1.

    The inner width is a quarter of the outer width. The first 1x1 convolution has the stride, as in the paper; in many
    later networks the 3x3 convolution has it.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, a multiple of 4.
        stride: Stride of the first convolution.
        pre_activate: Whether to start with BN and ReLU. False for the first block, since the stem ends with them.

    Shape:
        x: (B, in_channels, H, W). Output: (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, pre_activate: bool = True):
        super().__init__()
        width = out_channels // 4
        self.norm1 = batch_norm(in_channels) if pre_activate else None
        self.conv1 = Conv2dSame(in_channels, width, 1, stride)
        self.norm2 = batch_norm(width)
        self.conv2 = Conv2dSame(width, width, 3)
        self.norm3 = batch_norm(width)
        self.conv3 = Conv2dSame(width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual of `x`."""
        if self.norm1 is not None:
            x = F.relu(self.norm1(x))
        x = self.conv1(x)
        x = F.relu(self.norm2(x))
        x = self.conv2(x)
        x = F.relu(self.norm3(x))
        return self.conv3(x)


class PoolPadShortcut(nn.Module):
    """The shortcut of a basic block: average pooling and zero padding of the channels if the shape changes.

    It has no parameters.

    Shape:
        x: (B, in_channels, H, W). Output: (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        before = (out_channels - in_channels) // 2
        self.channel_padding = (before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` in the shape of the residual."""
        if self.stride > 1:
            # Odd sizes round up like the convolution. The official code fails on them.
            x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        return F.pad(x, (0, 0, 0, 0, *self.channel_padding)) if any(self.channel_padding) else x


def projection_shortcut(in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
    """Return the shortcut of a bottleneck: a 1x1 convolution of the block's input, without BN, if the shape changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return Conv2dSame(in_channels, out_channels, 1, stride)


@dataclass(frozen=True)
class BlockKind:
    """Components of one kind of block."""

    residual: type[BasicResidual] | type[BottleneckResidual]
    shortcut: Callable[[int, int, int], nn.Module]
    expansion: int
    """Ratio of a stage's channels to its width."""

    def channels(self, widths: Sequence[int]) -> list[int]:
        """Return the channels of the stem and each stage, given the widths in the paper's table."""
        return [widths[0], *(self.expansion * width for width in widths[1:])]


BLOCK_KINDS = {
    "basic": BlockKind(BasicResidual, PoolPadShortcut, expansion=1),
    "bottleneck": BlockKind(BottleneckResidual, projection_shortcut, expansion=4),
}


class ResidualBlock(nn.Module, HasSinglePolicy):
    """`y = shortcut(x) + residual(x)`; under `Checkpoint()` the residual is computed again from `x`."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, *, kind: BlockKind, pre_activate: bool = True
    ):
        super().__init__()
        self.residual = kind.residual(in_channels, out_channels, stride, pre_activate=pre_activate)
        self.shortcut = kind.shortcut(in_channels, out_channels, stride)
        self.set_policies(Store())

    @property
    def policy_units(self) -> list[PolicyUnit]:
        """The whole block, as one unit."""
        return [PolicyUnit("", (self.residual,), is_reversible=False)]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block's output."""
        assert isinstance(self._policy, AbstractModulePolicy)
        residual: Tensor = self._policy.call(self.residual, (x,), {})
        return self.shortcut(x) + residual


class MaxPool2dSame(nn.Module):
    """Max-pooling over 3x3 pixels with stride 2 and TensorFlow's SAME padding.

    Shape:
        x: (B, C, H, W). Output: (B, C, ceil(H / 2), ceil(W / 2)).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled map."""
        # SAME padding adds a pixel at both ends of an odd side, and at the far end of an even side, which `ceil_mode`
        # covers. Neither needs a padded copy, which autograd would store.
        return F.max_pool2d(x, 3, stride=2, padding=(x.shape[-2] % 2, x.shape[-1] % 2), ceil_mode=True)


@dataclass(frozen=True)
class StemKind:
    """Parameters of a stem: a convolution and optional pooling."""

    kernel_size: int
    stride: int
    pools: bool

    def make_stem(self, in_channels: int, width: int) -> PolicySequential:
        """Return convolution, BN, ReLU and optional pooling."""
        conv = Conv2dSame(in_channels, width, self.kernel_size, self.stride)
        return PolicySequential(conv, batch_norm(width), nn.ReLU(), *[MaxPool2dSame()] * self.pools)

    def feature_info(self, channels: Sequence[int]) -> list[dict[str, Any]]:
        """Describe the maps of a network with this stem. All stages except the first halve the image.

        Args:
            channels: Channels of the stem and each stage.
        """
        stem, *stages = channels
        reduction = 2 * self.stride if self.pools else self.stride
        activation = "stem.2" if self.pools else "stem"
        info: list[dict[str, Any]] = [{"num_chs": stem, "reduction": self.stride, "module": activation}]
        for stage, width in enumerate(stages):
            info.append({"num_chs": width, "reduction": reduction * 2**stage, "module": f"stages.{stage}"})
        return info


STEM_KINDS = {"small": StemKind(3, 1, pools=False), "large": StemKind(7, 2, pools=True)}


class ResNet(AbstractImageClassifier):
    """A pre-activation ResNet.

    Args:
        num_blocks: Number of blocks in each stage. Every stage except the first halves the image.
        widths: Width of the stem and of each stage, as in the paper's table. A bottleneck stage has 4 times this number
            of channels.
        block: "basic" for two 3x3 convolutions, or "bottleneck" for a 3x3 convolution between two 1x1 convolutions.
        stem: "small" for images of CIFAR's size: a 3x3 convolution. "large" for images of ImageNet's size: a 7x7
            convolution and max-pooling, each with stride 2.
        num_classes: Size of the output, or 0 for pooled features instead of logits.
        in_channels: Channels of the input images.

    Shape:
        x: (B, in_channels, H, W) with any H and W. Output: logits, (B, num_classes).

    Raises:
        TypeError: `num_blocks` or `widths` is not a sequence. In the forward pass: `x` is not a floating-point tensor.
        ValueError: A count is not positive, `widths` does not fit `num_blocks` or the block, or no block or stem has
            this name.
    """

    is_reversible = False

    def __init__(
        self,
        *,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        block: BlockName = "basic",
        stem: StemName = "small",
        num_classes: int = 10,
        in_channels: int = 3,
    ):
        super().__init__()
        check_choice("block", block, tuple(BLOCK_KINDS))
        check_choice("stem", stem, tuple(STEM_KINDS))
        check_stages(num_blocks, widths, may_shrink=block == "bottleneck")
        check_num_classes(num_classes)
        check_count("in_channels", in_channels, most=MOST_CHANNELS)
        channels = BLOCK_KINDS[block].channels(widths)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.num_features = channels[-1]
        self.feature_info = STEM_KINDS[stem].feature_info(channels)
        self.stem = STEM_KINDS[stem].make_stem(in_channels, channels[0])
        self.stages = nn.Sequential(
            *[
                _stage(channels[stage], channels[stage + 1], count, is_first=stage == 0, kind=BLOCK_KINDS[block])
                for stage, count in enumerate(num_blocks)
            ]
        )
        self.norm = batch_norm(channels[-1])
        self.head = make_head(channels[-1], num_classes)
        self._initialize(self)

    def _enter(self, x: Tensor) -> Tensor:
        return x

    def _join(self, y: Tensor) -> Tensor:
        return y

    def _finish(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))

    def _initialize(self, module: nn.Module) -> None:
        initialize(module)


def _stage(in_channels: int, out_channels: int, num_blocks: int, *, is_first: bool, kind: BlockKind) -> nn.Sequential:
    """Return a stage. The first stage keeps the image's size and follows the stem's activation."""
    return nn.Sequential(
        *[
            ResidualBlock(
                out_channels if block else in_channels,
                out_channels,
                stride=1 if is_first or block else 2,
                kind=kind,
                pre_activate=not is_first or block > 0,
            )
            for block in range(num_blocks)
        ]
    )


def batch_norm(num_channels: int) -> BatchNorm2dBiased:
    """Return batch norm with the official constants. Its moving average of 0.99 is a momentum of 0.01 in PyTorch."""
    return BatchNorm2dBiased(num_channels, eps=1e-3, momentum=0.01)


@register_model(image_size=32)
def resnet32(*, num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return ResNet-32 for CIFAR: 464,154 parameters for 10 classes."""
    return ResNet(num_blocks=(5, 5, 5), widths=(16, 16, 32, 64), num_classes=num_classes, in_channels=in_channels)


@register_model(image_size=32)
def resnet110(*, num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return ResNet-110 for CIFAR: 1,727,962 parameters for 10 classes."""
    return ResNet(num_blocks=(18, 18, 18), widths=(16, 16, 32, 64), num_classes=num_classes, in_channels=in_channels)


@register_model(image_size=32)
def resnet164(*, num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return ResNet-164 for CIFAR with bottlenecks: 1,703,258 parameters for 10 classes."""
    return ResNet(
        num_blocks=(18, 18, 18),
        widths=(16, 16, 32, 64),
        block="bottleneck",
        num_classes=num_classes,
        in_channels=in_channels,
    )


@register_model(image_size=224)
def resnet50(*, num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """Return ResNet-50 for ImageNet with bottlenecks: 25,549,352 parameters for 1000 classes."""
    return ResNet(
        num_blocks=(3, 4, 6, 3),
        widths=(64, 64, 128, 256, 512),
        block="bottleneck",
        stem="large",
        num_classes=num_classes,
        in_channels=in_channels,
    )


@register_model(image_size=224)
def resnet101(*, num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """Return ResNet-101 for ImageNet with bottlenecks: 44,541,480 parameters for 1000 classes."""
    return ResNet(
        num_blocks=(3, 4, 23, 3),
        widths=(64, 64, 128, 256, 512),
        block="bottleneck",
        stem="large",
        num_classes=num_classes,
        in_channels=in_channels,
    )
