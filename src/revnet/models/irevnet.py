"""i-RevNets: classifiers that are invertible up to the final pooling.

A RevNet loses information in the stem and wherever it halves the image. An i-RevNet turns squares of pixels into
channels instead, so the network is a bijection from images to its last map. There are two streams, and the residual
functions update them alternately. The first function of a stage that halves the image reads the larger map, with a
convolution of stride 2.

The functions of a stage run as one reversible sequence, so memory does not grow with the number of blocks. B C H W:
batch, channels, height, width.

References:
    Jacobsen, Smeulders and Oyallon (2018), i-RevNet: Deep Invertible Networks, section 3;
    https://github.com/jhjacobsen/pytorch-i-revnet.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnet._checks import MOST_CHANNELS, MOST_LAYERS, check_count, check_floating, check_tensor, describe
from revnet._types import TensorPair
from revnet.engine._split import split
from revnet.models._checks import check_counts_of, check_images, check_num_classes, explain_input_errors
from revnet.models._image_classifier import AbstractImageClassifier, make_head
from revnet.models._initialize import initialize
from revnet.models._registry import register_model
from revnet.nn import (
    AbstractPolicy,
    BatchNorm2dUnbiased,
    CouplingLayer,
    PolicySequential,
    Reverse,
    ReversibleSequential,
    SpaceToDepth,
)
from revnet.nn.policies._has_policies import as_policy


class Stem(SpaceToDepth):
    """Turn squares of pixels into channels, after checking that the network can halve the image often enough.

    Shape:
        x: (B, in_channels, H, W), sides divisible by `reduction`. Output: (B, 4 in_channels, H / 2, W / 2).
    """

    def __init__(self, reduction: int):
        super().__init__()
        self.reduction = reduction

    def forward(self, x: Tensor) -> Tensor:
        """Return the image at half the size."""
        height, width = x.shape[-2:]
        if height % self.reduction or width % self.reduction:
            fitting = "x".join(str(-(-side // self.reduction) * self.reduction) for side in (height, width))
            raise ValueError(
                f"images of {height}x{width} cannot be halved by every stage; resize or pad them to sides that are "
                f"multiples of {self.reduction}, {fitting} for instance."
            )
        return super().forward(x)


class DepthToSpace(SpaceToDepth):
    """The inverse of `SpaceToDepth`, which gives the first function of a stage the map at its previous size."""

    def forward(self, x: Tensor) -> Tensor:
        """Turn channels back into squares of pixels."""
        return self.inverse(x)


class Residual(nn.Sequential):
    """A residual function: three times batch norm, ReLU and 3x3 convolution, with widths w -> hidden -> hidden -> w.

    Shape:
        x: (B, C, H, W). Output: the same, also with stride 2, where `DepthToSpace` comes first.
    """

    def __init__(self, width: int, hidden_width: int, *, stride: int = 1, pre_activate: bool = True):
        in_width = width // stride**2
        layers: list[nn.Module] = [DepthToSpace()] if stride == 2 else []
        if pre_activate:
            layers += [BatchNorm2dUnbiased(in_width), nn.ReLU()]
        layers.append(_conv(in_width, hidden_width, stride))
        for out_width in (hidden_width, width):
            layers += [BatchNorm2dUnbiased(hidden_width), nn.ReLU(), _conv(hidden_width, out_width, 1)]
        super().__init__(*layers)


def _conv(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class Stage(nn.Module):
    """Residual functions at one map size, which update the streams alternately.

    Shape:
        x: the pair x1, x2, both (B, C, H, W). Output: the pair y1, y2, both (B, C stride^2, H / stride, W / stride).
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        num_blocks: int,
        *,
        stride: int,
        num_before: int,
        policy: AbstractPolicy,
    ):
        super().__init__()
        self.downsample = SpaceToDepth(stride)
        blocks = [
            CouplingLayer(
                Residual(
                    width,
                    hidden_width,
                    stride=stride if block == 0 else 1,
                    pre_activate=num_before + block > 0,
                ),
                updates=1 if (num_before + block) % 2 else 0,
            )
            for block in range(num_blocks)
        ]
        self.blocks = ReversibleSequential(*blocks, policy=policy)

    def forward(self, x: TensorPair) -> TensorPair:
        """Run the stage."""
        x1, x2 = x
        return self.blocks((self.downsample(x1), self.downsample(x2)))

    def inverse(self, y: TensorPair) -> TensorPair:
        """Compute the stage's input from its output."""
        x1, x2 = self.blocks.inverse(y)
        return self.downsample.inverse(x1), self.downsample.inverse(x2)


class IRevNet(AbstractImageClassifier):
    """A fully invertible classifier.

    Args:
        num_blocks: Number of residual functions in each stage.
        strides: 2 for each stage that halves the image, 1 for each other stage. The stem has already halved it once.
            Halving multiplies the channels by 4.
        hidden_widths: Channels inside the residual functions of each stage. None means a quarter of the stream.
        num_classes: Size of the output, or 0 for pooled features instead of logits.
        in_channels: Channels of the input images.
        policy: Policy for the activations of the blocks, or its name. The default is `Reverse()`. `Store()` makes the
            stored twin.

    Shape:
        x: (B, in_channels, H, W) with sides that are multiples of the total stride. Output: logits,
        (B, num_classes).

    Numerics:
        `inverse` undoes each block in floating point, so images come back up to rounding that grows with depth. Use
        evaluation mode: in training mode, batch norm reads the statistics of the batch, which must be the same batch.
        Functions that compute in bfloat16 make this rounding much coarser, also in the backward pass.
        `revnet.set_coupling(model, FixedPoint())` removes it.

    Raises:
        TypeError: `num_blocks`, `strides` or `hidden_widths` is not a sequence, or `policy` is not a policy. In the
            passes: the input is not a floating-point tensor.
        ValueError: A count is not positive, the lengths differ, a stride is above 2, or no policy has this name. In the
            passes: the shape does not fit.

    References:
        Jacobsen, Smeulders and Oyallon (2018), i-RevNet: Deep Invertible Networks, section 3.
    """

    is_reversible = True

    def __init__(
        self,
        *,
        num_blocks: Sequence[int],
        strides: Sequence[int],
        hidden_widths: Sequence[int] | None = None,
        num_classes: int = 10,
        in_channels: int = 3,
        policy: AbstractPolicy | str | None = None,
    ):
        super().__init__()
        check_num_classes(num_classes)
        check_count("in_channels", in_channels, most=MOST_CHANNELS)
        _check_stages(num_blocks, strides, hidden_widths)
        policy = Reverse() if policy is None else as_policy(policy)
        # Widths of one stream: the stem turns each channel into four, shared by two streams.
        widths = list(accumulate(strides, lambda width, stride: width * stride**2, initial=2 * in_channels))
        if widths[-1] > MOST_CHANNELS:
            raise ValueError(
                f"`strides` (={describe(tuple(strides))}) must halve the image less often: each time the number of "
                f"channels grows by a factor of four, to {2 * widths[-1]:,} at the end."
            )
        if hidden_widths is None:
            hidden_widths = [max(1, width // 4) for width in widths[1:]]
        reductions = list(accumulate(strides, lambda a, b: a * b, initial=2))
        num_before = list(accumulate(num_blocks, initial=0))
        self.in_channels = in_channels
        self.size_multiple = reductions[-1]
        self.num_classes = num_classes
        self.num_features = 2 * widths[-1]
        self.feature_info = [
            {"num_chs": 2 * width, "reduction": reduction, "module": f"maps.{index - 1}" if index else "stem"}
            for index, (width, reduction) in enumerate(zip(widths, reductions, strict=True))
        ]
        self.stem = PolicySequential(Stem(reductions[-1]))
        self.stages = nn.Sequential(
            *[
                Stage(
                    widths[stage + 1],
                    hidden_widths[stage],
                    num_blocks[stage],
                    stride=strides[stage],
                    num_before=num_before[stage],
                    policy=policy,
                )
                for stage in range(len(num_blocks))
            ]
        )
        self._add_maps()
        self.norm = BatchNorm2dUnbiased(self.num_features)
        self.head = make_head(self.num_features, num_classes)
        self._initialize(self)

    def forward_invertible(self, x: Tensor) -> Tensor:
        """Compute the last map, from which `inverse` computes the images: (B, num_features, H', W').

        The final features are this map after batch norm and ReLU, which drops negative values.
        """
        check_images(x)
        return explain_input_errors(
            self, lambda x: self._join(self.stages(self._enter(self.stem(x)))), x, self.in_channels
        )

    def inverse(self, y: Tensor) -> Tensor:
        """Compute the images from the last map, as `forward_invertible` returns it."""
        check_tensor("y", y)
        if y.ndim != 4 or y.shape[1] != self.num_features:
            raise ValueError(
                f"`y` (of shape {tuple(y.shape)}) must be (B, {self.num_features}, H, W), as `forward_invertible` "
                "returns it."
            )
        check_floating("y", y)
        images: Tensor = explain_input_errors(self, self._invert, y, None, name="y")
        return images

    def _invert(self, y: Tensor) -> Tensor:
        streams = split(y, 1)
        for stage in reversed(self.stages):
            assert isinstance(stage, Stage)
            streams = stage.inverse(streams)
        (stem,) = self.stem
        assert isinstance(stem, Stem)
        return stem.inverse(torch.cat(streams, 1))

    def _enter(self, x: Tensor) -> TensorPair:
        return split(x, 1)

    def _join(self, y: TensorPair) -> Tensor:
        return torch.cat(y, 1)

    def _finish(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))

    def _initialize(self, module: nn.Module) -> None:
        initialize(module)


def _check_stages(num_blocks: Sequence[int], strides: Sequence[int], hidden_widths: Sequence[int] | None) -> None:
    counts = {"num_blocks": (num_blocks, MOST_LAYERS), "strides": (strides, MOST_LAYERS)}
    counts |= {} if hidden_widths is None else {"hidden_widths": (hidden_widths, MOST_CHANNELS)}
    for name, (values, most) in counts.items():
        check_counts_of(name, values, most=most, example="(1, 2, 2)")
        if not num_blocks:
            raise ValueError(f"`num_blocks` (={describe(num_blocks)}) must have at least one stage, such as (1, 2, 2).")
        if len(values) != len(num_blocks):
            raise ValueError(
                f"`{name}` (={describe(tuple(values))}) must have one entry for each of the {len(num_blocks)} "
                f"stages of `num_blocks` (={describe(tuple(num_blocks))})."
            )
    for stage, stride in enumerate(strides):
        if stride > 2:
            raise ValueError(f"`strides[{stage}]` (={stride}) must be 1, or 2 to halve the image.")


@register_model(image_size=32)
def irevnet_cifar(
    *, num_classes: int = 10, in_channels: int = 3, policy: AbstractPolicy | str | None = None
) -> IRevNet:
    """Return a small bijective i-RevNet for CIFAR, which is not in the paper: 2,590,642 parameters for 10 classes.

    The published CIFAR network is not bijective: it pads the image with 29 zero channels. Rebuilt channels are not
    exactly zero, and batch norm, which divides by their standard deviation, amplifies the difference.
    """
    return IRevNet(
        num_blocks=(6, 6, 6),
        strides=(1, 2, 2),
        hidden_widths=(32, 64, 128),
        num_classes=num_classes,
        in_channels=in_channels,
        policy=policy,
    )


@register_model(image_size=224)
def irevnet301(*, num_classes: int = 1000, in_channels: int = 3, policy: AbstractPolicy | str | None = None) -> IRevNet:
    """Return the bijective i-RevNet-301 for ImageNet: 125,120,356 parameters for 1000 classes."""
    return IRevNet(
        num_blocks=(6, 16, 72, 6),
        strides=(2, 2, 2, 2),
        num_classes=num_classes,
        in_channels=in_channels,
        policy=policy,
    )
