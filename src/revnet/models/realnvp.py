"""RealNVP: a density of images with several scales and affine couplings.

At each scale, three couplings update one color of a checkerboard of pixels from the other; then squares of four pixels
become channels, and three couplings update half of the channels from the other half. After that, half of the channels
become a part of the code, and the others go on to the next scale. The last scale has four checkerboard couplings.

The two colors of a checkerboard are two streams here: in each square of four pixels, one diagonal is the first stream
and the other diagonal the second. So all couplings of one kind run as one reversible sequence.

B C H W: batch, channels, height, width; D = C H W: the number of components of an image and of its code.

References:
    Dinh, Sohl-Dickstein and Bengio (2017), Density Estimation Using Real NVP, sections 3 and 4.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnet._checks import MOST_CHANNELS, MOST_LAYERS, check_count, check_counts, describe, is_number
from revnet.models._density import AbstractImageDensity
from revnet.models._prior import PriorName
from revnet.models.glow import check_scales, code_shapes, split_codes
from revnet.nn import (
    AbstractInvertible,
    AbstractPolicy,
    ChannelPermutation,
    FlowStep,
    InvertibleSequential,
    MultiScaleSequential,
    Reverse,
    SpaceToDepth,
)
from revnet.nn.policies._has_policies import as_policy

_DIAGONAL, _OTHER_DIAGONAL = (0, 3), (1, 2)
"""Pixels of a square of four, as `SpaceToDepth` orders them."""


class ResidualCoupling(nn.Module):
    """The network of a coupling: a small residual network. Its last convolution is initialized to zero.

    Shape:
        x: (B, num_channels, H, W). Output: (B, num_outputs, H, W).
    """

    def __init__(self, num_channels: int, num_outputs: int, *, hidden_dim: int, num_blocks: int):
        super().__init__()
        self.first = nn.Conv2d(num_channels, hidden_dim, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1),
            )
            for _ in range(num_blocks)
        )
        self.last = nn.Conv2d(hidden_dim, num_outputs, 1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Compute shift and raw scale."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(F.relu(x))


class CheckerboardCoupling(nn.Module):
    """A network at full resolution for a coupling of the two colors of a checkerboard.

    It lays the pixels that stay out as an image with zeros in between, as the mask of the paper does, and returns shift
    and raw scale of the other pixels.

    Args:
        num_channels: Channels of the image.
        updates: The color that the coupling updates: 0 or 1.
        hidden_dim: Channels inside the network.
        num_blocks: Residual blocks of the network.

    Shape:
        x: (B, 2 num_channels, H / 2, W / 2), one color. Output: (B, 4 num_channels, H / 2, W / 2).
    """

    def __init__(self, num_channels: int, *, updates: Literal[0, 1], hidden_dim: int, num_blocks: int):
        super().__init__()
        self.net = ResidualCoupling(num_channels, 2 * num_channels, hidden_dim=hidden_dim, num_blocks=num_blocks)
        self.updates = updates

    def forward(self, x: Tensor) -> Tensor:
        """Compute shift and raw scale of the other color."""
        zeros = torch.zeros_like(x)
        image = _from_colors(*((zeros, x) if self.updates == 0 else (x, zeros)))
        shift, raw_scale = self.net(image).chunk(2, 1)
        return torch.cat((_to_colors(shift)[self.updates], _to_colors(raw_scale)[self.updates]), 1)


class RealNVP(AbstractImageDensity):
    """A density of images that can also be sampled.

    The default widths are the paper's for images of 32x32: two scales, and residual networks of 64 channels at the
    first scale, twice as many at the next, with 8 blocks. Before training, call `initialize_act_norms(model, x)` with
    some hundred images.

    It differs from the paper in two points: `ActNorm` replaces batch norm between the couplings, so that a sample does
    not depend on its batch and the inverse holds in training, too; and the networks of the couplings have no
    normalization inside.

    Args:
        image_shape: Shape of the images, (C, H, W). Height and width are multiples of `2 ** num_scales`.
        num_scales: Number of scales.
        num_couplings: Number of checkerboard couplings and of channel-wise couplings of each scale, 3 in the paper. The
            last scale has one more checkerboard coupling and no channel-wise ones.
        hidden_dim: Channels inside the networks of the first scale; each scale doubles them.
        num_blocks: Residual blocks of each network.
        prior: Distribution of the components of a code: "gaussian", which the paper uses, or "logistic".
        alpha: Margin that keeps pixels away from 0 and 1, where the logit is infinite. The model is a density of
            `logit(alpha + (1 - 2 alpha) x)`, mapped back to the images.
        policy: Policy for the activations of the couplings, or its name. The default is `Reverse()`. `Store()` makes
            the stored twin.

    Shape:
        x: (B, C, H, W) in [0, 1], *dequantized* by adding uniform noise that is as wide as one gray level.
        z: (B, D), the finest scale first.

    Raises:
        TypeError: `policy` is not a policy. In the passes: the input is not a floating-point tensor.
        ValueError: A count is not positive, the sides of `image_shape` are not multiples of `2 ** num_scales`, `alpha`
            is not between 0 and 0.5, or no prior or policy has this name. In the passes: the input has another shape.

    Numerics:
        `inverse` restores images up to the rounding of each coupling, amplified by the scales of the couplings.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), Density Estimation Using Real NVP.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_scales: int = 2,
        num_couplings: int = 3,
        hidden_dim: int = 64,
        num_blocks: int = 8,
        prior: PriorName = "gaussian",
        alpha: float = 0.05,
        policy: AbstractPolicy | str | None = None,
    ):
        super().__init__(image_shape, prior)
        check_scales(image_shape, num_scales)
        check_counts(num_couplings=num_couplings, num_blocks=num_blocks, most=MOST_LAYERS)
        check_count("hidden_dim", hidden_dim, most=MOST_CHANNELS)
        if not is_number(alpha) or not 0 < alpha < 0.5:
            raise ValueError(f"`alpha` (={describe(alpha)}) must be a number between 0 and 0.5; 0.05 is usual.")
        policy = Reverse() if policy is None else as_policy(policy)
        self.alpha = alpha
        scales = []
        num_channels = image_shape[0]
        for index in range(num_scales):
            sizes = {"hidden_dim": hidden_dim * 2**index, "num_blocks": num_blocks}
            is_last = index == num_scales - 1
            layers: list[AbstractInvertible | FlowStep] = [
                SpaceToDepth(),
                ChannelPermutation(4 * num_channels, _color_order(num_channels)),
            ]
            layers += _checkerboard_steps(num_channels, num_couplings + is_last, **sizes)
            if not is_last:
                back = [_color_order(num_channels).index(channel) for channel in range(4 * num_channels)]
                layers.append(ChannelPermutation(4 * num_channels, back))
                layers += _channel_steps(4 * num_channels, num_couplings, **sizes)
            scales.append(InvertibleSequential(*layers, policy=policy))
            num_channels *= 2
        self.flow = MultiScaleSequential(*scales)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.alpha + (1 - 2 * self.alpha) * x
        y = torch.logit(p)
        codes, log_det = self.flow.forward_with_log_det(y)
        # The derivative of the logit is 1 / (p (1 - p)), and -log(p (1 - p)) = softplus(y) + softplus(-y).
        log_slope = (F.softplus(y) + F.softplus(-y) + math.log(1 - 2 * self.alpha)).flatten(1).sum(1)
        return torch.cat([code.flatten(1) for code in codes], 1), log_det + log_slope

    def _decode(self, z: Tensor) -> Tensor:
        y = self.flow.inverse(split_codes(z, code_shapes(self.image_shape, len(self.flow.scales))))
        return (torch.sigmoid(y) - self.alpha) / (1 - 2 * self.alpha)


def _checkerboard_steps(num_channels: int, num_steps: int, *, hidden_dim: int, num_blocks: int) -> list[FlowStep]:
    sizes = {"hidden_dim": hidden_dim, "num_blocks": num_blocks}
    return [
        FlowStep(
            CheckerboardCoupling(num_channels, updates=_alternating(index), **sizes),
            num_channels=4 * num_channels,
            updates=_alternating(index),
            mixes=False,
        )
        for index in range(num_steps)
    ]


def _channel_steps(num_channels: int, num_steps: int, *, hidden_dim: int, num_blocks: int) -> list[FlowStep]:
    sizes = {"hidden_dim": hidden_dim, "num_blocks": num_blocks}
    return [
        FlowStep(
            ResidualCoupling(num_channels // 2, num_channels, **sizes),
            num_channels=num_channels,
            updates=_alternating(index),
            mixes=False,
        )
        for index in range(num_steps)
    ]


def _alternating(index: int) -> Literal[0, 1]:
    return 1 if index % 2 else 0


def _color_order(num_channels: int) -> list[int]:
    """Return the channels after `SpaceToDepth` in an order with the two colors of the checkerboard one by one."""
    return [
        pixel * num_channels + channel
        for color in (_DIAGONAL, _OTHER_DIAGONAL)
        for pixel in color
        for channel in range(num_channels)
    ]


def _from_colors(first: Tensor, second: Tensor) -> Tensor:
    """Lay out the two colors of a checkerboard, each (B, 2 C, H / 2, W / 2), as an image, (B, C, H, W)."""
    upper_left, lower_right = first.chunk(2, 1)
    upper_right, lower_left = second.chunk(2, 1)
    upper = torch.stack((upper_left, upper_right), -1).flatten(-2)
    lower = torch.stack((lower_left, lower_right), -1).flatten(-2)
    return torch.stack((upper, lower), -2).flatten(-3, -2)


def _to_colors(image: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `_from_colors`."""
    upper, lower = image[..., ::2, :], image[..., 1::2, :]
    return (
        torch.cat((upper[..., ::2], lower[..., 1::2]), 1),
        torch.cat((upper[..., 1::2], lower[..., ::2]), 1),
    )
