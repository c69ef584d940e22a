"""The color distortion of Inception, which the paper's ImageNet recipe uses."""

import torch
from torch import Tensor, nn

from revnet.data._random_keys import Purpose, check_keys, uniform
from revnet.data.transforms._hsv import hsv_to_rgb, rgb_to_hsv

_BRIGHTNESS = 32 / 255
_FACTORS = (0.5, 1.5)
"""Bounds of the factors of contrast and saturation."""
_HUE = 0.2


def make_color_distortion() -> nn.Module:
    """Return the color distortion of the paper's ImageNet recipe, for RGB pixels *before* `Preprocess`.

    Each image has its own uniform draws: up to 32 gray levels are added or subtracted; contrast, the distance to the
    mean of each channel, and saturation are multiplied by 0.5 to 1.5 each; hue turns by up to a fifth of the circle.
    Brightness comes first. Contrast comes before saturation and hue in half of the images and after them in the others,
    as in the paper's code. Unlike there, pixels are also clipped to 0..255 before saturation and hue, which are
    undefined outside that range.

    The draws of an image are a function of its key, as in `make_augment`.

    Returns:
        A module from uint8 to uint8, for a batch of shape (B, 3, H, W) and its keys, active in training mode only.

    References:
        Gomez et al. (2017), The Reversible Residual Network; official code, renmengye/revnet-public, the ImageNet
        input, taken from Szegedy et al. (2016), Rethinking the Inception Architecture for Computer Vision.
    """
    return ColorDistortion()


class ColorDistortion(nn.Module):
    """Distort the colors of a training batch, see `make_color_distortion`.

    Shape:
        images: (B, 3, H, W), uint8. Output: the same.
        keys: (B,), int64.

    Raises:
        TypeError: The images of a call are not uint8.
        ValueError: The images of a call are not RGB, or the keys are not one int64 for each image.
    """

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Distort one batch; without keys, draw them from PyTorch's global CPU generator.

        In evaluation mode, return the batch unchanged.
        """
        if not self.training:
            return images
        if images.dtype != torch.uint8:
            raise TypeError(f"`images` (={images.dtype}) must be uint8 pixels; distort them before `Preprocess`.")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"`images` (of shape {tuple(images.shape)}) must be RGB, (B, 3, H, W); leave out the distortion for "
                "gray images."
            )
        draws = uniform(check_keys(keys, images), 5, Purpose.COLOR).T[..., None, None, None]  # (5, B, 1, 1, 1)
        brightness = _scale_to(-_BRIGHTNESS, _BRIGHTNESS, draws[0])
        contrast = _scale_to(*_FACTORS, draws[1])
        saturation = _scale_to(*_FACTORS, draws[2])
        turn = _scale_to(-_HUE, _HUE, draws[3])
        is_contrast_first = draws[4] < 0.5

        pixels = images / 255 + brightness
        pixels = _adjust_contrast(pixels, contrast.where(is_contrast_first, 1))
        pixels = _adjust_saturation_and_hue(pixels.clamp(0, 1), saturation, turn)
        pixels = _adjust_contrast(pixels, contrast.where(~is_contrast_first, 1))
        return pixels.clamp(0, 1).mul(255).round().to(torch.uint8)


def _scale_to(low: float, high: float, draw: Tensor) -> Tensor:
    return low + (high - low) * draw


def _adjust_contrast(pixels: Tensor, contrast: Tensor) -> Tensor:
    mean = pixels.mean((2, 3), keepdim=True)
    return mean + contrast * (pixels - mean)


def _adjust_saturation_and_hue(pixels: Tensor, factor: Tensor, turn: Tensor) -> Tensor:
    hue, saturation, value = rgb_to_hsv(pixels)
    return hsv_to_rgb(hue + turn, (factor * saturation).clamp(max=1), value)
