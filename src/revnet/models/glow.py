"""Glow: a density of images with several scales, whose steps mix the channels by learned matrices.

At each scale, squares of four pixels become channels, and a row of steps normalizes the channels, mixes them by an
invertible matrix, and couples the two halves by a convolutional network. Then half of the channels become a part of the
code, and the others go on to the next scale. All steps of a scale run as one reversible sequence.

B C H W: batch, channels, height, width; D = C H W: the number of components of an image and of its code.

References:
    Kingma and Dhariwal (2018), Glow: Generative Flow with Invertible 1x1 Convolutions, section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from revnet._checks import MOST_CHANNELS, MOST_LAYERS, check_count, check_counts
from revnet.coupling import Affine
from revnet.models._density import AbstractImageDensity
from revnet.models._prior import PriorName
from revnet.nn import AbstractPolicy, FlowStep, InvertibleSequential, MultiScaleSequential, Reverse, SpaceToDepth
from revnet.nn.policies._has_policies import as_policy

MOST_SCALES = 16


class ConvCoupling(nn.Sequential):
    """The network of a coupling: 3x3, 1x1 and 3x3 convolutions with ReLU. The last is initialized to zero.

    Shape:
        x: (B, num_channels, H, W). Output: (B, 2 num_channels, H, W), shift and raw scale.
    """

    def __init__(self, num_channels: int, hidden_dim: int):
        last = nn.Conv2d(hidden_dim, 2 * num_channels, 3, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        super().__init__(
            nn.Conv2d(num_channels, hidden_dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_dim, hidden_dim, 1),
            nn.ReLU(),
            last,
        )


class Glow(AbstractImageDensity):
    """A density of images that can also be sampled.

    The default widths are the paper's for CIFAR-10: three scales of 32 steps with 512 channels. Before training, call
    `initialize_act_norms(model, x)` with some hundred images.

    It differs from the authors' code in three points: all components of a code have the standard prior, instead of a
    prior learned from the later scales; the couplings have no normalization inside; and the scale of a coupling is
    bounded by a hyperbolic tangent.

    Args:
        image_shape: Shape of the images, (C, H, W). Height and width are multiples of `2 ** num_scales`.
        num_scales: Number of scales, L in the paper.
        num_steps: Number of steps of each scale, K in the paper.
        hidden_dim: Channels inside the network of each coupling.
        prior: Distribution of the components of a code: "gaussian", which the paper uses, or "logistic".
        policy: Policy for the activations of the steps, or its name. The default is `Reverse()`. `Store()` makes the
            stored twin.

    Shape:
        x: (B, C, H, W) in [0, 1], *dequantized* by adding uniform noise that is as wide as one gray level.
        z: (B, D), the finest scale first.

    Raises:
        TypeError: `policy` is not a policy. In the passes: the input is not a floating-point tensor.
        ValueError: A count is not positive, the sides of `image_shape` are not multiples of `2 ** num_scales`, or no
            prior or policy has this name. In the passes: the input has another shape.

    Numerics:
        `inverse` restores images up to the rounding of each step, amplified by the condition of the matrices and the
        scales of the couplings.

    References:
        Kingma and Dhariwal (2018), Glow: Generative Flow with Invertible 1x1 Convolutions.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_scales: int = 3,
        num_steps: int = 32,
        hidden_dim: int = 512,
        prior: PriorName = "gaussian",
        policy: AbstractPolicy | str | None = None,
    ):
        super().__init__(image_shape, prior)
        check_scales(image_shape, num_scales)
        check_counts(num_steps=num_steps, most=MOST_LAYERS)
        check_count("hidden_dim", hidden_dim, most=MOST_CHANNELS)
        policy = Reverse() if policy is None else as_policy(policy)
        scales = []
        num_channels = image_shape[0]
        for _ in range(num_scales):
            num_channels *= 4
            steps = [
                FlowStep(ConvCoupling(num_channels // 2, hidden_dim), num_channels=num_channels, coupling=Affine())
                for _ in range(num_steps)
            ]
            scales.append(InvertibleSequential(SpaceToDepth(), *steps, policy=policy))
            num_channels //= 2
        self.flow = MultiScaleSequential(*scales)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, log_det = self.flow.forward_with_log_det(x - 0.5)
        return torch.cat([code.flatten(1) for code in codes], 1), log_det

    def _decode(self, z: Tensor) -> Tensor:
        return self.flow.inverse(split_codes(z, code_shapes(self.image_shape, len(self.flow.scales)))) + 0.5


def check_scales(image_shape: tuple[int, int, int], num_scales: int) -> None:
    """Raise unless the sides of the images can be halved at each scale."""
    check_count("num_scales", num_scales, most=MOST_SCALES)
    factor = 2**num_scales
    channels, height, width = image_shape
    if height % factor or width % factor:
        fitting = (channels, -(-height // factor) * factor, -(-width // factor) * factor)
        raise ValueError(
            f"`image_shape` (={tuple(image_shape)}) must have sides that are multiples of {factor}, since each of the "
            f"scales halves them and `num_scales` is {num_scales}; use images of {fitting}, or fewer scales."
        )


def code_shapes(image_shape: tuple[int, int, int], num_scales: int) -> list[tuple[int, int, int]]:
    """Return the shape of the code of each scale, of which all but the last factor out half of their channels."""
    channels, height, width = image_shape
    shapes = []
    for scale in range(1, num_scales + 1):
        side = (height // 2**scale, width // 2**scale)
        is_last = scale == num_scales
        shapes.append((channels * (4 if is_last else 2), *side))
        channels *= 2
    return shapes


def split_codes(z: Tensor, shapes: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """Return the code of each scale from the code of the whole image, (B, D)."""
    sizes = [channels * height * width for channels, height, width in shapes]
    return [code.view(z.shape[0], *shape) for code, shape in zip(z.split(sizes, 1), shapes, strict=True)]
