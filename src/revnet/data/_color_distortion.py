"""The colour distortion of Inception, with which the paper trains on ImageNet."""

import math

import torch
from torch import Tensor, nn

from revnet.data._optional import require

_BRIGHTNESS = 32 / 255
_FACTORS = (0.5, 1.5)
"""Least and greatest, of contrast and of saturation."""
_HUE = 0.2
_CIRCLE = 2 * math.pi
"""kornia counts hue in radians."""


def make_color_distortion() -> nn.Module:
    """The colour distortion of the paper's ImageNet recipe, for RGB pixels *before* `Preprocess`: uint8 in, uint8 out.

    Each image has its own draws, all uniform: up to 32 grey levels are added or taken away; contrast, that is, the
    distance to the mean of each channel, and saturation are multiplied by 0.5 to 1.5 each; hue turns by up to a fifth
    of the circle. Brightness comes first. Contrast comes before saturation and hue in half of the images and after them
    in the others, as in the paper's code. Unlike there, pixels are brought back into 0..255 before saturation and hue
    too, which mean nothing elsewhere.

    The draws come from PyTorch's global CPU generator, wherever the batch lies, so `torch.manual_seed` fixes them.

    Returns:
        A module for a batch of shape (B, 3, H, W), active in training mode only.

    Raises:
        MissingDependencyError: kornia is not installed.

    References:
        Gomez et al. (2017), The Reversible Residual Network; official code, renmengye/revnet-public, the ImageNet
        input, which is that of Szegedy et al. (2016), Rethinking the Inception Architecture for Computer Vision.
    """
    return ColorDistortion()


class ColorDistortion(nn.Module):
    """What `make_color_distortion` makes.

    Shape:
        images: (B, 3, H, W), uint8. Output: the same.

    Raises:
        TypeError: The images of a call are not uint8.
        ValueError: They are not RGB.
    """

    def __init__(self) -> None:
        super().__init__()
        color = require("kornia.color", package="kornia", purpose="colour distortion")
        self.to_hsv = color.RgbToHsv()
        self.to_rgb = color.HsvToRgb()

    def forward(self, images: Tensor) -> Tensor:
        """Distort one batch; in eval mode, return it unchanged."""
        if not self.training:
            return images
        if images.dtype != torch.uint8:
            raise TypeError(f"`images` (={images.dtype}) must be uint8 pixels; distort them before `Preprocess`.")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"`images` (of shape {tuple(images.shape)}) must be RGB, (B, 3, H, W); leave out the distortion for "
                "grey ones."
            )
        draws = torch.rand(5, len(images), 1, 1, 1).to(images.device)  # one copy to the device for all of them
        brightness = _between(-_BRIGHTNESS, _BRIGHTNESS, draws[0])
        contrast = _between(*_FACTORS, draws[1])
        saturation = _between(*_FACTORS, draws[2])
        turn = _between(-_HUE, _HUE, draws[3])
        is_contrast_first = draws[4] < 0.5

        pixels = images / 255 + brightness
        pixels = _stretch(pixels, contrast.where(is_contrast_first, 1))
        pixels = self._adjust_saturation_and_hue(pixels.clamp(0, 1), saturation, turn)
        pixels = _stretch(pixels, contrast.where(~is_contrast_first, 1))
        return pixels.clamp(0, 1).mul(255).round().to(torch.uint8)

    def _adjust_saturation_and_hue(self, pixels: Tensor, factor: Tensor, turn: Tensor) -> Tensor:
        hue, saturation, value = self.to_hsv(pixels).split(1, dim=1)
        hue = (hue + _CIRCLE * turn) % _CIRCLE
        return self.to_rgb(torch.cat([hue, (factor * saturation).clamp(max=1), value], dim=1))


def _between(low: float, high: float, draw: Tensor) -> Tensor:
    return low + (high - low) * draw


def _stretch(pixels: Tensor, contrast: Tensor) -> Tensor:
    mean = pixels.mean((2, 3), keepdim=True)
    return mean + contrast * (pixels - mean)
