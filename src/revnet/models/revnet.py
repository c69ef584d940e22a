"""RevNets: residual networks whose blocks are reversible.

The networks follow the official code: the output of the stem is split into two streams of half the channels, the
streams pass through the stages as a pair, and the head reads their concatenation. The first block of a stage that
changes the shape is not reversible, so its input is stored; all other activations of the blocks are computed again.
B C H W: batch, channels, height, width.

References:
    Gomez et al. (2017), The Reversible Residual Network, section 3.2 and table 2.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnet._checks import MOST_CHANNELS, check_choice, check_count
from revnet._torch_release import is_autocast_on
from revnet._types import TensorPair
from revnet.coupling import Additive
from revnet.engine import Chain, HalfBlock
from revnet.engine._split import split
from revnet.models._checks import check_num_classes, check_stages
from revnet.models._image_classifier import AbstractImageClassifier, make_head
from revnet.models._initialize import initialize
from revnet.models._registry import register_model
from revnet.models.resnet import BLOCK_KINDS, STEM_KINDS, BlockKind, BlockName, StemName, batch_norm
from revnet.nn import AbstractPolicy, Reverse, ReversibleBlock, ReversibleSequential
from revnet.nn.policies._has_policies import HasSinglePolicy, PolicyUnit, as_policy

# A global name, because until 2.11 `torch.compile` cannot build the default of a half-block by itself.
_ADDITIVE = Additive()


class Downsample(nn.Module, HasSinglePolicy):
    """The first block of a stage, which is not reversible since it changes the shape.

    `y1 = shortcut1(x1) + f(x2)`, `y2 = shortcut2(x2) + g(y1)`, where f has the stride. Each sum is a half-block on the
    streams `(shortcut1(x1), x2)` and `(y1, shortcut2(x2))`. Under `Reverse()` the activations of f and g are therefore
    computed again from `x2` and `y1`, and the block stores only its input and `y1`.

    Shape:
        x: the pair x1, x2, both (B, in_channels, H, W).
        Output: the pair y1, y2, both (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        kind: BlockKind,
        pre_activate: bool = True,
        policy: AbstractPolicy,
    ):
        super().__init__()
        self.shortcut1 = kind.shortcut(in_channels, out_channels, stride)
        self.shortcut2 = kind.shortcut(in_channels, out_channels, stride)
        self.f = kind.residual(in_channels, out_channels, stride, pre_activate=pre_activate)
        self.g = kind.residual(out_channels, out_channels)
        self.set_policies(policy)

    @property
    def policy_units(self) -> list[PolicyUnit]:
        """The whole block, as one unit."""
        return [PolicyUnit("", (self.f, self.g), is_reversible=True, half_blocks=(self._half_f, self._half_g))]

    @property
    def _half_f(self) -> HalfBlock:
        return HalfBlock(self.f, 0, 1, "downsample.f", _ADDITIVE)

    @property
    def _half_g(self) -> HalfBlock:
        return HalfBlock(self.g, 1, 0, "downsample.g", _ADDITIVE, "g")

    def forward(self, x: TensorPair) -> TensorPair:
        """Compute the pair `(y1, y2)`."""
        x1, x2 = x
        # Shortcuts keep the precision of the streams. Under autocast a projection returns a lower one.
        y1 = self.shortcut1(x1).to(x1.dtype)
        y1, x2 = self._policy.run(Chain([self._half_f]).bind(), (y1, x2))
        y2 = self.shortcut2(x2).to(x2.dtype)
        y1, y2 = self._policy.run(Chain([self._half_g]).bind(), (y1, y2))
        return y1, y2


class RevNet(AbstractImageClassifier):
    """A reversible residual network.

    Args:
        num_blocks: Number of blocks in each stage. Every stage except the first halves the image.
        widths: Width of the stem and of each stage, both streams together, as in the paper's table. Widths are even. A
            bottleneck stage has 4 times this number of channels.
        block: "basic" for two 3x3 convolutions in each residual function, or "bottleneck" for a 3x3 convolution between
            two 1x1 convolutions.
        stem: "small" for images of CIFAR's size: a 3x3 convolution. "large" for images of ImageNet's size: a 7x7
            convolution and max-pooling, each with stride 2.
        num_classes: Size of the output, or 0 for pooled features instead of logits.
        in_channels: Channels of the input images.
        policy: Policy for the activations of the reversible blocks, or its name. The default is `Reverse()`. `Store()`
            makes the stored twin. The stem is not reversible and keeps its own policy, which
            `model.stem.set_policies(Checkpoint())` changes.

    Shape:
        x: (B, in_channels, H, W) with any H and W. Output: logits, (B, num_classes).

    Numerics:
        Under autocast the streams stay in float32, so that they can be rebuilt, and the residual functions compute in
        low precision.

    Raises:
        TypeError: `num_blocks` or `widths` is not a sequence, or `policy` is not a policy. In the forward pass: `x` is
            not a floating-point tensor.
        ValueError: A count is not positive, a width is odd, `widths` does not fit `num_blocks` or the block, or no
            block, stem or policy has this name.

    References:
        Gomez et al. (2017), The Reversible Residual Network, section 3.2.
    """

    is_reversible = True

    def __init__(
        self,
        *,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        block: BlockName = "basic",
        stem: StemName = "small",
        num_classes: int = 10,
        in_channels: int = 3,
        policy: AbstractPolicy | str | None = None,
    ):
        super().__init__()
        check_choice("block", block, tuple(BLOCK_KINDS))
        check_choice("stem", stem, tuple(STEM_KINDS))
        check_stages(num_blocks, widths, multiple_of=2, may_shrink=block == "bottleneck")
        check_num_classes(num_classes)
        check_count("in_channels", in_channels, most=MOST_CHANNELS)
        policy = Reverse() if policy is None else as_policy(policy)
        channels = BLOCK_KINDS[block].channels(widths)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.num_features = channels[-1]
        self.feature_info = STEM_KINDS[stem].feature_info(channels)
        self.stem = STEM_KINDS[stem].make_stem(in_channels, channels[0])
        self.stages = nn.Sequential(
            *[
                _stage(
                    channels[stage] // 2,
                    channels[stage + 1] // 2,
                    count,
                    is_first=stage == 0,
                    kind=BLOCK_KINDS[block],
                    policy=policy,
                )
                for stage, count in enumerate(num_blocks)
            ]
        )
        self._add_maps()
        self.norm = batch_norm(channels[-1])
        self.head = make_head(channels[-1], num_classes)
        self._initialize(self)

    def _enter(self, x: Tensor) -> TensorPair:
        # Under autocast the stem's map has low precision, which is too coarse to rebuild the streams.
        return split(x.float() if is_autocast_on(x.device.type) else x, dim=1)

    def _join(self, y: TensorPair) -> Tensor:
        return torch.cat(y, dim=1)

    def _finish(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))

    def _initialize(self, module: nn.Module) -> None:
        initialize(module)


def _stage(
    in_channels: int,
    out_channels: int,
    num_blocks: int,
    *,
    is_first: bool,
    kind: BlockKind,
    policy: AbstractPolicy,
) -> nn.Sequential:
    """Return a stage with streams of `out_channels`. The first keeps the image's size and follows an activation."""
    changes_shape = not is_first or in_channels != out_channels
    blocks = [
        ReversibleBlock(
            kind.residual(out_channels, out_channels, pre_activate=not is_first or block > 0),
            kind.residual(out_channels, out_channels),
        )
        for block in range(1 if changes_shape else 0, num_blocks)
    ]
    stage = nn.Sequential()
    if changes_shape:
        stride = 1 if is_first else 2
        downsample = Downsample(in_channels, out_channels, stride, kind=kind, pre_activate=not is_first, policy=policy)
        stage.add_module("downsample", downsample)
    stage.add_module("reversible", ReversibleSequential(*blocks, policy=policy))
    return stage


@register_model(image_size=32)
def revnet38(*, num_classes: int = 10, in_channels: int = 3, policy: AbstractPolicy | str | None = None) -> RevNet:
    """Return RevNet-38, the counterpart of ResNet-32, for CIFAR: 464,890 parameters for 10 classes."""
    return RevNet(
        num_blocks=(3, 3, 3), widths=(32, 32, 64, 112), num_classes=num_classes, in_channels=in_channels, policy=policy
    )


@register_model(image_size=32)
def revnet110(*, num_classes: int = 10, in_channels: int = 3, policy: AbstractPolicy | str | None = None) -> RevNet:
    """Return RevNet-110, the counterpart of ResNet-110, for CIFAR: 1,729,194 parameters for 10 classes."""
    return RevNet(
        num_blocks=(9, 9, 9), widths=(32, 32, 64, 128), num_classes=num_classes, in_channels=in_channels, policy=policy
    )


@register_model(image_size=32)
def revnet164(*, num_classes: int = 10, in_channels: int = 3, policy: AbstractPolicy | str | None = None) -> RevNet:
    """Return RevNet-164 for CIFAR with bottlenecks: 1,748,778 parameters for 10 classes.

    It is the counterpart of ResNet-164.
    """
    return RevNet(
        num_blocks=(9, 9, 9),
        widths=(32, 32, 64, 128),
        block="bottleneck",
        num_classes=num_classes,
        in_channels=in_channels,
        policy=policy,
    )


@register_model(image_size=224)
def revnet56(*, num_classes: int = 1000, in_channels: int = 3, policy: AbstractPolicy | str | None = None) -> RevNet:
    """Return RevNet-56 for ImageNet with bottlenecks: 27,553,128 parameters for 1000 classes.

    It is the counterpart of ResNet-50.
    """
    return RevNet(
        num_blocks=(2, 2, 3, 2),
        widths=(128, 128, 256, 512, 832),
        block="bottleneck",
        stem="large",
        num_classes=num_classes,
        in_channels=in_channels,
        policy=policy,
    )


@register_model(image_size=224)
def revnet104(*, num_classes: int = 1000, in_channels: int = 3, policy: AbstractPolicy | str | None = None) -> RevNet:
    """Return RevNet-104 for ImageNet with bottlenecks: 45,428,072 parameters for 1000 classes.

    It is the counterpart of ResNet-101.
    """
    return RevNet(
        num_blocks=(2, 2, 11, 2),
        widths=(128, 128, 256, 512, 832),
        block="bottleneck",
        stem="large",
        num_classes=num_classes,
        in_channels=in_channels,
        policy=policy,
    )
