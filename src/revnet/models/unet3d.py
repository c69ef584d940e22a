"""A partially reversible U-Net for volumes.

The blocks of every level are reversible in the encoder and the decoder, so memory does not grow with their number. The
modules that change the shape between levels are not reversible. The network follows the published code
("NoNewReversible"): a 3x3x3 convolution leads into the first level, max-pooling and a 1x1x1 convolution lead down, and
a 1x1x1 convolution and trilinear interpolation lead up, where the output of the encoder's level is added. The published
network ends in a sigmoid. Here the output is logits, and the sigmoid belongs to the loss.

B C D H W: batch, channels, depth, height, width.

References:
    Bruegger et al. (2019), A Partially Reversible U-Net for Memory-Efficient Volumetric Image Segmentation;
    https://github.com/RobinBruegger/PartiallyReversibleUnet.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from revnet._checks import MOST_CHANNELS, MOST_LAYERS, check_counts, check_floating, check_tensor, describe
from revnet._units import counted
from revnet.models._checks import check_counts_of, explain_input_errors
from revnet.models.pretrained.mixin import HubMixin
from revnet.nn import (
    AbstractPolicy,
    HasGradientCheckpointing,
    PolicySequential,
    Reverse,
    ReversibleBlock,
    ReversibleSequential,
)
from revnet.nn.policies._has_policies import as_policy


class Residual(nn.Module):
    """A residual function: group norm, leaky ReLU, 3x3x3 convolution.

    Shape:
        x: (B, C, D, H, W). Output: the same.
    """

    def __init__(self, num_channels: int, num_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, num_channels)
        self.conv = nn.Conv3d(num_channels, num_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual of `x`."""
        # In place, since nothing else reads the output of the norm.
        return self.conv(F.leaky_relu(self.norm(x), inplace=True))


class UNet3d(HasGradientCheckpointing, HubMixin):
    """A U-Net for segmenting volumes, with reversible blocks.

    The defaults are the published network, which maps four MRI sequences to three overlapping regions of a tumor.

    Args:
        in_channels: Channels of the input.
        num_classes: Channels of the output, which are the logits of the classes or regions.
        widths: Channels of each level, both streams together, from the full size down. Widths are even. Every level
            halves the sides of the volume.
        num_blocks: Number of reversible blocks in each level on the way down.
        num_decoder_blocks: Number of reversible blocks in each level on the way up. None means the same number as on
            the way down. The paper tries more blocks on the way down, and always uses one on the way up.
        policy: Policy for the activations of the blocks, or its name. The default is `Reverse()`. `Store()` makes the
            stored twin. The modules between the levels, `downsamples` and `upsamples`, have a policy of their own,
            `Store()`. `revnet.nn.set_policy(model.downsamples, Checkpoint())` saves the indices of the pooling and its
            output.

    Shape:
        x: (B, in_channels, D, H, W), where D, H and W are multiples of 2^(levels - 1): 16 for five levels.
        Output: (B, num_classes, D, H, W).

    Raises:
        TypeError: `widths` is not a sequence, or `policy` is not a policy. In the forward pass: `x` is not a
            floating-point tensor, or has another dtype than the weights.
        ValueError: A count is not positive, a width is odd, or no policy has this name. In the forward pass: the volume
            cannot be halved that often, or has another number of channels.
    """

    _card_task = "volume"

    def __init__(
        self,
        *,
        in_channels: int = 4,
        num_classes: int = 3,
        widths: Sequence[int] = (60, 120, 240, 360, 480),
        num_blocks: int = 1,
        num_decoder_blocks: int | None = None,
        policy: AbstractPolicy | str | None = None,
    ):
        super().__init__()
        if num_decoder_blocks is None:
            num_decoder_blocks = num_blocks
        check_counts(in_channels=in_channels, num_classes=num_classes, most=MOST_CHANNELS)
        check_counts(num_blocks=num_blocks, num_decoder_blocks=num_decoder_blocks, most=MOST_LAYERS)
        _check_widths(widths)
        policy = Reverse() if policy is None else as_policy(policy)
        self.in_channels = in_channels
        self.num_classes = num_classes
        # The published network has 30 groups in every norm, half of the first width.
        groups = [math.gcd(widths[0] // 2, width // 2) for width in widths]
        levels = list(zip(widths, groups, strict=True))
        self.stem = nn.Conv3d(in_channels, widths[0], 3, padding=1, bias=False)
        self.encoder = nn.ModuleList([_blocks(*level, num_blocks, policy) for level in levels])
        self.downsamples = nn.ModuleList(
            [PolicySequential(nn.MaxPool3d(2), nn.Conv3d(upper, lower, 1)) for upper, lower in pairwise(widths)]
        )
        self.decoder = nn.ModuleList([_blocks(*level, num_decoder_blocks, policy) for level in levels])
        self.upsamples = nn.ModuleList(
            [
                PolicySequential(nn.Conv3d(lower, upper, 1), nn.Upsample(scale_factor=2, mode="trilinear"))
                for upper, lower in pairwise(widths)
            ]
        )
        self.head = nn.Conv3d(widths[0], num_classes, 1)

    @property
    def size_multiple(self) -> int:
        """Number of which the sides of a volume must be multiples."""
        return 2 ** len(self.downsamples)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of every voxel."""
        self._check_volume(x)
        y = self.encoder[0](explain_input_errors(self, self.stem, x, self.in_channels))
        skips = []
        for downsample, blocks in zip(self.downsamples, self.encoder[1:], strict=True):
            skips.append(y)
            y = blocks(downsample(y))
        y = self.decoder[-1](y)
        for upsample, blocks in zip(reversed(self.upsamples), reversed(self.decoder[:-1]), strict=True):
            y = blocks(upsample(y) + skips.pop())
        return self.head(y)

    def _check_volume(self, x: Tensor) -> None:
        check_tensor("x", x)
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"`x` (of shape {_sides(x.shape)}) must be (B, {self.in_channels}, D, H, W): a batch of volumes with "
                f"{counted(self.in_channels, 'channel')}; for one volume pass `x[None]`."
            )
        check_floating("x", x)
        factor = self.size_multiple
        if any(size % factor for size in x.shape[2:]):
            fitting = _sides([-(-size // factor) * factor for size in x.shape[2:]])
            raise ValueError(
                f"`x` (of shape {_sides(x.shape)}) must have sides that are multiples of {factor}, since they are "
                f"halved {len(self.downsamples)} times; pad the volume to {fitting} with `torch.nn.functional.pad`."
            )


def _sides(sizes: Sequence[int]) -> str:
    # Only for errors: `torch.compile` cannot follow `str` of a size that varies.
    return "x".join(map(str, sizes))


def _blocks(width: int, num_groups: int, num_blocks: int, policy: AbstractPolicy) -> ReversibleSequential:
    """Return the blocks of a level."""
    stream = width // 2
    return ReversibleSequential(
        *[ReversibleBlock(Residual(stream, num_groups), Residual(stream, num_groups)) for _ in range(num_blocks)],
        policy=policy,
    )


def _check_widths(widths: Sequence[int]) -> None:
    check_counts_of("widths", widths, most=MOST_CHANNELS, example="(60, 120, 240)")
    if not widths:
        raise ValueError(f"`widths` (={describe(widths)}) must have at least one level, for instance (60, 120, 240).")
    for level, width in enumerate(widths):
        if width % 2:
            raise ValueError(
                f"`widths[{level}]` (={width}) must be even, since a reversible block splits the channels in two; "
                f"use {width + 1}."
            )
