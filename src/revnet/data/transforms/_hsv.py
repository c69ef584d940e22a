"""Conversion between RGB and hue, saturation, value."""

import torch
from torch import Tensor


def rgb_to_hsv(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return hue, saturation and value of RGB pixels in 0..1, each (B, 1, H, W).

    Hue is in turns, 0..1, and 0 for gray pixels; saturation and value are in 0..1.

    References:
        Smith (1978), Color Gamut Transform Pairs.
    """
    red, green, blue = rgb.split(1, dim=1)
    value = rgb.amax(1, keepdim=True)
    chroma = value - rgb.amin(1, keepdim=True)
    saturation = chroma / value.where(value > 0, 1)
    divisor = chroma.where(chroma > 0, 1)
    sextant = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    return (sextant / 6) % 1, saturation, value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Return the RGB pixels in 0..1, (B, 3, H, W); the arguments are as `rgb_to_hsv` returns them."""
    offsets = torch.tensor([5, 3, 1], dtype=hue.dtype, device=hue.device).view(1, 3, 1, 1)  # red, green, blue
    position = (offsets + 6 * hue) % 6
    # 1 where the channel is darkest, 0 where it is brightest, linear between.
    darkness = torch.minimum(position, 4 - position).clamp(0, 1)
    return value - value * saturation * darkness
