"""A density of images with the grey levels that it was fitted to: image bytes in, likelihoods out, and bytes drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from revnet.data import Dequantize
from revnet.errors import CheckpointError
from revnet.models import NICE
from revnet.training._checkpoint import find_weights, read_weights
from revnet.training._product import AbstractHeader, begin_metadata, check_fit, check_metadata

_DEVIATIONS = {"logistic": math.pi / math.sqrt(3), "gaussian": 1.0}


@dataclass(frozen=True, kw_only=True)
class DensityHeader(AbstractHeader):
    """What it takes to rebuild a density, but the tensors."""

    model: str = "nice"
    """Name of the model."""

    data: str
    """Data set, as it was named in the settings."""

    image_shape: tuple[int, int, int]
    """(C, H, W) of the images."""

    num_levels: int
    """Grey levels of the images."""

    options: Mapping[str, Any]
    """What the model is built with."""

    def to_metadata(self) -> dict[str, str]:
        """Give the header as the flat strings that safetensors stores."""
        return begin_metadata("nice") | {
            "model": self.model,
            "data": self.data,
            "image_shape": json.dumps(self.image_shape),
            "num_levels": json.dumps(self.num_levels),
            "options": json.dumps(dict(self.options)),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> Self:
        """Read what `to_metadata` gave; `path` is for the error message.

        Raises:
            CheckpointError: The metadata are not revnet's, of a later format, or of no density.
        """
        check_metadata(metadata, path, "nice")
        try:
            channels, height, width = json.loads(metadata["image_shape"])
            return cls(
                model=metadata["model"],
                data=metadata["data"],
                image_shape=(channels, height, width),
                num_levels=json.loads(metadata["num_levels"]),
                options=json.loads(metadata["options"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"`{path}` was not written by `revnet train`; its header is not revnet's.") from error


class ImageDensity(nn.Module):
    """Bytes in, bits out: the `model` of dequantised images, see `revnet.data.Dequantize`.

    Shape:
        images: (B, C, H, W), uint8. Output: bits per dimension, (B,).
    """

    def __init__(self, model: NICE, header: DensityHeader) -> None:
        super().__init__()
        self.model = model
        self.dequantize = Dequantize(header.num_levels)
        self.header = header

    @classmethod
    def create(cls, header: DensityHeader) -> Self:
        """Make a density with freshly drawn weights."""
        return cls(NICE(image_shape=header.image_shape, **header.options), header)

    @classmethod
    def from_tensors(cls, header: DensityHeader, tensors: Mapping[str, Tensor], path: Path) -> Self:
        """Rebuild a density from its state; `path` is for the error message.

        Raises:
            CheckpointError: The model cannot be built, or the tensors do not fit it.
        """
        try:
            density = cls.create(header)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"`{path}` cannot be rebuilt: {error}") from error
        check_fit(density, tensors, path)
        density.load_state_dict(tensors)
        return density

    @torch.no_grad()
    def adapt_scale(self, images: Tensor, generator: torch.Generator) -> None:
        """Scale the codes of `images`, uint8, to the deviation of the prior: where training begins.

        The scaling would need thousands of updates to get there by itself.

        References:
            Kingma and Dhariwal (2018), Glow, section 3.1: an initialisation that depends on the data.
        """
        codes, _ = self.model(self.dequantize(images, generator))
        of_noise = 1 / (math.sqrt(12) * self.header.num_levels)  # all that is known of a single image
        deviations = codes.std(0) if len(codes) > 1 else torch.full_like(codes[0], of_noise)
        self.model.log_scale.add_((_DEVIATIONS[self.model.prior] / deviations).log())

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Bits per dimension of each image, an upper bound on those of the bytes in the mean over the noise."""
        log_prob = self.model.log_prob(self.dequantize(images, generator))
        return self.model.bits_per_dim(log_prob, self.header.num_levels)

    @torch.no_grad()
    def sample(self, num_samples: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw images, (num_samples, C, H, W), uint8; see `NICE.sample`."""
        return self.dequantize.inverse(self.model.sample(num_samples, temperature=temperature, generator=generator))

    def inpaint(
        self, images: Tensor, mask: Tensor, *, generator: torch.Generator | None = None, **options: Any
    ) -> Tensor:
        """Fill in what is missing, where `mask` is false; see `NICE.inpaint`, which takes the `options`.

        Returns:
            The images, uint8; known pixels are as they were.
        """
        x = self.dequantize(images, generator)
        filled = self.dequantize.inverse(self.model.inpaint(x, mask, generator=generator, **options))
        return torch.where(mask.to(images.device, torch.bool), images, filled)


def load_density(path: str | Path) -> ImageDensity:
    """Rebuild the density that a run of `revnet train nice` has left, on the CPU and in evaluation mode.

    Args:
        path: A `.safetensors` file, a `.ckpt` file, or the folder of a run, whose last weights are taken.

    Raises:
        CheckpointError: There is no such file, it is truncated, holds another kind of model, or its tensors do not fit.
    """
    path = find_weights(Path(path))
    metadata, tensors = read_weights(path)
    return ImageDensity.from_tensors(DensityHeader.from_metadata(metadata, path), tensors, path).eval()
