"""A density of images: likelihoods of image bytes, and image bytes drawn at random."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from revnet._outside_text import shorten
from revnet.data import Dequantize
from revnet.models import NICE, Glow, RealNVP
from revnet.models._density import AbstractImageDensity
from revnet.nn import initialize_act_norms
from revnet.training.run.checkpoint import load_module
from revnet.training.saved_module import AbstractHeader, SavedModule

MODELS: dict[str, type[AbstractImageDensity]] = {"nice": NICE, "realnvp": RealNVP, "glow": Glow}
"""The class of each model, by its name in the settings."""

EVALUATION_BATCH_SIZE = 500

_DEVIATIONS = {"logistic": math.pi / math.sqrt(3), "gaussian": 1.0}


@dataclass(frozen=True, kw_only=True)
class DensityHeader(AbstractHeader):
    """Everything that it takes to rebuild a density, except its tensors."""

    kind: ClassVar[str] = "nice"

    model: str = "nice"
    """Name of the model."""

    data: str
    """Data set, as in the settings."""

    image_shape: tuple[int, int, int]
    """Shape of the images, (C, H, W)."""

    num_levels: int
    """Number of gray levels of the images."""

    options: Mapping[str, Any]
    """Arguments of the model, except the shape of the images."""

    is_resized: bool = False
    """Whether the images were photographs of any size, which were resized and cropped."""

    def __post_init__(self) -> None:
        if min(self.image_shape) < 1:
            raise ValueError("`image_shape` must be positive.")


class ImageDensity(SavedModule):
    """A `model` of dequantized images, see `revnet.data.Dequantize`: from bytes to bits per dimension.

    Shape:
        images: (B, C, H, W), uint8. Output: bits per dimension, (B,).
    """

    header_type: ClassVar[type[AbstractHeader]] = DensityHeader
    header: DensityHeader
    model: AbstractImageDensity

    def __init__(self, model: AbstractImageDensity, header: DensityHeader) -> None:
        super().__init__()
        self.model = model
        self.dequantize = Dequantize(header.num_levels)
        self.header = header

    @classmethod
    def create(cls, header: DensityHeader) -> Self:
        """Make a density with random weights."""
        if header.model not in MODELS:
            raise ValueError(f"`model` (='{shorten(header.model)}') is not one of {', '.join(MODELS)}; update revnet.")
        make_model: Any = MODELS[header.model]
        return cls(make_model(image_shape=header.image_shape, **header.options), header)

    @classmethod
    def build(cls, header: DensityHeader, tensors: Mapping[str, Tensor]) -> Self:
        """Build the density of `header`."""
        return cls.create(header)

    @torch.no_grad()
    def adapt_scale(self, images: Tensor, generator: torch.Generator) -> None:
        """Scale the codes of `images`, uint8, to the standard deviation of the prior, before training.

        RealNVP and Glow set each normalization layer from what it receives. Without this, training would need thousands
        of updates to learn the scale.

        References:
            Kingma and Dhariwal (2018), Glow, section 3.1: data-dependent initialization.
        """
        if not isinstance(self.model, NICE):
            initialize_act_norms(self.model, self.dequantize(images, generator))
            return
        codes, _ = self.model(self.dequantize(images, generator))
        # A single image has no deviation; then the deviation of the noise must do.
        noise_deviation = 1 / (math.sqrt(12) * self.header.num_levels)
        deviations = codes.std(0) if len(codes) > 1 else torch.full_like(codes[0], noise_deviation)
        self.model.log_scale.add_((_DEVIATIONS[self.model.prior] / deviations).log())

    def forward(
        self, images: Tensor, generator: torch.Generator | None = None, *, keys: Tensor | None = None
    ) -> Tensor:
        """Compute the bits per dimension of each image: on average over the noise, an upper bound for its bytes.

        The noise comes from `generator` or is a function of `keys`, see `revnet.data.Dequantize`.
        """
        log_prob = self.model.log_prob(self.dequantize(images, generator, keys=keys))
        return self.model.bits_per_dim(log_prob, self.header.num_levels)

    @torch.no_grad()
    def sample(self, num_samples: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw images, (num_samples, C, H, W), uint8; see the method of the model."""
        return self.dequantize.inverse(self.model.sample(num_samples, temperature=temperature, generator=generator))

    def inpaint(
        self, images: Tensor, mask: Tensor, *, generator: torch.Generator | None = None, **options: Any
    ) -> Tensor:
        """Fill in the missing pixels, where `mask` is false; see the method of the model, which takes the `options`.

        Returns:
            The images, uint8, with the known pixels unchanged.
        """
        x = self.dequantize(images, generator)
        filled = self.dequantize.inverse(self.model.inpaint(x, mask, generator=generator, **options))
        return torch.where(mask.to(images.device, torch.bool), images, filled)


def load_density(path: str | Path) -> ImageDensity:
    """Rebuild the density of a run of `revnet train nice`, on the CPU and in evaluation mode.

    Args:
        path: A `.safetensors` file, a `.ckpt` file, or the folder of a run, whose last weights are loaded.

    Raises:
        CheckpointError: The file does not exist, is truncated, holds another kind of model, or its tensors do not fit.
    """
    return load_module(ImageDensity, path)


@torch.no_grad()
def mean_bits_per_dim(density: ImageDensity, images: Tensor, device: torch.device, seed: int = 0) -> float:
    """Compute the mean bits per dimension of images, uint8, with the noise of one seed; move `density` to `device`."""
    density.to(device).eval()
    noise = torch.Generator().manual_seed(seed)
    batches = images.split(EVALUATION_BATCH_SIZE)
    return sum(float(density(batch.to(device), noise).double().sum()) for batch in batches) / len(images)
