"""RevNets: residual networks whose blocks are reversible.

As the official code builds them: the stem's output is split into two streams of half the channels, the streams run
through the stages as a pair, and the head sees them joined. The first block of a stage that changes the shape is not
reversible, so its input is kept; all other activations of the blocks are computed again. B C H W: batch, channels,
height, width.

References:
    Gomez et al. (2017), The Reversible Residual Network, section 3.2 and table 2.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnet._types import TensorPair
from revnet.functional import HalfBlock, split
from revnet.models._checks import check_positive, check_stages
from revnet.models._registry import register_model
from revnet.models.resnet import BasicResidual, PoolPadShortcut, batch_norm, initialize
from revnet.nn import AbstractPolicy, Conv2dSame, Reverse, ReversibleBlock, ReversibleSequential


class Downsample(nn.Module):
    """The first block of a stage, which changes the shape and so is not reversible.

    `y1 = shortcut(x1) + f(x2)`, `y2 = shortcut(x2) + g(y1)`; f has the stride. Each sum by itself is half of a
    reversible block, on the streams `(shortcut(x1), x2)` and `(y1, shortcut(x2))`. So under `Reverse()` the activations
    of f and g are computed again from `x2` and `y1`; of the block itself, only its input and `y1` are held.

    Shape:
        x: the pair x1, x2, both (B, in_channels, H, W).
        Output: the pair y1, y2, both (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, pre_activate: bool = True, policy: AbstractPolicy
    ):
        super().__init__()
        self.shortcut = PoolPadShortcut(in_channels, out_channels, stride)
        self.f = BasicResidual(in_channels, out_channels, stride, pre_activate=pre_activate)
        self.g = BasicResidual(out_channels, out_channels)
        self.policy = policy

    def forward(self, x: TensorPair) -> TensorPair:
        """Compute the pair `(y1, y2)`."""
        x1, x2 = x
        y1, x2, _ = self.policy.run([HalfBlock(self.f, 0, "downsample.f")], self.shortcut(x1), x2, (), {})
        y1, y2, _ = self.policy.run([HalfBlock(self.g, 1, "downsample.g")], y1, self.shortcut(x2), (), {})
        return y1, y2


class RevNet(nn.Module):
    """A reversible residual network for small images.

    Args:
        num_blocks: Blocks of each stage; every stage but the first halves the image.
        widths: Channels of the stem and of each stage, both streams together; even.
        num_classes: Size of the output.
        in_channels: Channels of the input images.
        policy: What to do with the activations of the reversible blocks. `Store()` makes the stored twin.

    Shape:
        x: (B, in_channels, H, W), any H and W. Output: logits (B, num_classes).

    Raises:
        ValueError: A count is not positive, a width is odd, or `widths` does not fit `num_blocks`.

    References:
        Gomez et al. (2017), The Reversible Residual Network, section 3.2.
    """

    is_reversible = True

    def __init__(
        self,
        *,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
        policy: AbstractPolicy | None = None,
    ):
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels)
        check_stages(num_blocks, widths, multiple_of=2)
        self.stem = nn.Sequential(Conv2dSame(in_channels, widths[0], 3), batch_norm(widths[0]), nn.ReLU())
        self.stages = nn.Sequential(
            *[
                _stage(
                    widths[stage] // 2, widths[stage + 1] // 2, count, is_first=stage == 0, policy=policy or Reverse()
                )
                for stage, count in enumerate(num_blocks)
            ]
        )
        self.norm = batch_norm(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)
        initialize(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the features before pooling, (B, widths[-1], H', W')."""
        y1, y2 = self.stages(split(self.stem(x), dim=1))
        return F.relu(self.norm(torch.cat((y1, y2), dim=1)))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits."""
        return self.head(self.forward_features(x).mean((-2, -1)))


def _stage(
    in_channels: int, out_channels: int, num_blocks: int, *, is_first: bool, policy: AbstractPolicy
) -> nn.Sequential:
    """A stage on streams of `out_channels`; the first keeps the image's size, and follows the stem's activation."""
    changes_shape = not is_first or in_channels != out_channels
    blocks = [
        ReversibleBlock(
            BasicResidual(out_channels, out_channels, pre_activate=not is_first or block > 0),
            BasicResidual(out_channels, out_channels),
        )
        for block in range(1 if changes_shape else 0, num_blocks)
    ]
    stage = nn.Sequential()
    if changes_shape:
        stride = 1 if is_first else 2
        downsample = Downsample(in_channels, out_channels, stride, pre_activate=not is_first, policy=policy)
        stage.add_module("downsample", downsample)
    stage.add_module("reversible", ReversibleSequential(*blocks, policy=policy))
    return stage


@register_model
def revnet38(*, num_classes: int = 10, in_channels: int = 3, policy: AbstractPolicy | None = None) -> RevNet:
    """RevNet-38 for CIFAR: 464,890 parameters for 10 classes. The pair of ResNet-32."""
    return RevNet(
        num_blocks=(3, 3, 3), widths=(32, 32, 64, 112), num_classes=num_classes, in_channels=in_channels, policy=policy
    )
