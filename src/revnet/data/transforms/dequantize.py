"""Conversion of gray levels to numbers that have a density, and back."""

import torch
from torch import Tensor, nn

from revnet._checks import check_tensor
from revnet.data._random_keys import Purpose, check_keys, uniform


class Dequantize(nn.Module):
    """Spread each gray level over a cell of [0, 1): level k of K becomes `(k + u) / K`, with u uniform in [0, 1).

    A density fitted to the bytes themselves puts spikes on them and grows without bound. With the noise, the mean
    log-density over the noise bounds the log-probability of the bytes: `log P(k) >= E[log p((k + u) / K)] - D log K`.

    Args:
        num_levels: Number of levels K, spread evenly over 0..255 as in the data sets of `load_dataset`: 256, or 17 for
            digits, see `count_levels`.

    Shape:
        images: any, uint8. Output: the same, float32 in [0, 1).

    Raises:
        TypeError: The images of a call are not uint8.
        ValueError: `num_levels` is not from 2 to 256, a call has both a generator and keys, or the keys are not one
            int64 for each image.

    References:
        Uria, Murray and Larochelle (2013), RNADE, section 5.1, for the noise.
        Theis, van den Oord and Bethge (2016), A Note on the Evaluation of Generative Models, section 3.1: the bound.
    """

    def __init__(self, num_levels: int = 256) -> None:
        super().__init__()
        if not 2 <= num_levels <= 256:
            raise ValueError(f"`num_levels` (={num_levels}) must be from 2 to 256; pass 256 for bytes of any value.")
        self.num_levels = num_levels

    def forward(
        self, images: Tensor, generator: torch.Generator | None = None, *, keys: Tensor | None = None
    ) -> Tensor:
        """Add the noise: a function of `keys`, drawn from `generator`, or else drawn from PyTorch's random state.

        Args:
            images: The pixels.
            generator: A generator on the CPU, or None.
            keys: Keys of the images, as `make_loader(..., keys=True)` yields them, or None. With its key, an image has
                the same noise in any batch, in any process and on any device.
        """
        check_tensor("images", images, hint="pass `torch.as_tensor(images)`, (B, C, H, W)")
        if images.dtype != torch.uint8:
            raise TypeError(
                f"`images` (={images.dtype}) must be uint8 pixels, 0 to 255; pass them as they were loaded."
            )
        levels = images.float().mul((self.num_levels - 1) / 255).round()
        noise = self._noise(images, generator, keys)
        # The sum of a high level and a number next to 1 may round up to the level above.
        return ((levels + noise) / self.num_levels).clamp(max=1 - 2**-24)

    def _noise(self, images: Tensor, generator: torch.Generator | None, keys: Tensor | None) -> Tensor:
        if keys is None:
            device = images.device if generator is None else generator.device
            return torch.rand(images.shape, device=device, generator=generator).to(images.device)
        if generator is not None:
            raise ValueError("`generator` and `keys` each determine the noise; pass one of them.")
        return uniform(check_keys(keys, images), images[:1].numel(), Purpose.NOISE).view(images.shape)

    def inverse(self, x: Tensor) -> Tensor:
        """Return the uint8 pixels whose cells contain `x`; numbers outside [0, 1) get the nearest level."""
        levels = x.mul(self.num_levels).floor().clamp(0, self.num_levels - 1)
        return levels.mul(255 / (self.num_levels - 1)).round().to(torch.uint8)

    def extra_repr(self) -> str:
        """Return the number of levels, for `print`."""
        return f"num_levels={self.num_levels}"


def count_levels(images: Tensor) -> int:
    """Return the number of gray levels of uint8 images: 17 for digits.

    256 unless all pixels are on an even scale of fewer levels.
    """
    values = images.unique().long()
    scale = torch.arange(len(values)).mul(255 / max(1, len(values) - 1)).round().long()
    return len(values) if len(values) > 1 and torch.equal(values, scale) else 256
