"""The interface of density models of images: likelihood, samples, and completion of missing pixels."""

import abc
import math
from typing import Literal

import torch
from torch import Tensor

from revnet._checks import (
    MOST_CHANNELS,
    check_choice,
    check_count,
    check_floating,
    check_generator,
    check_tensor,
    describe,
    is_number,
)
from revnet.models._checks import explain_input_errors
from revnet.models._prior import PRIORS, PriorName, draw
from revnet.models.pretrained.mixin import HubMixin
from revnet.nn import HasGradientCheckpointing

_MOST_STEPS = 1_000_000
_MOST_SAMPLES = 1_000_000


class AbstractImageDensity(HasGradientCheckpointing, HubMixin, abc.ABC):
    """A density of images that can also be sampled: a bijection from images to codes, and a prior of the codes.

    Args:
        image_shape: Shape of the images, (C, H, W).
        prior: Distribution of the components of a code: "logistic" or "gaussian".
    """

    _card_task = "density"

    def __init__(self, image_shape: tuple[int, int, int], prior: PriorName):
        super().__init__()
        check_image_shape(image_shape)
        check_choice("prior", prior, tuple(PRIORS))
        channels, height, width = image_shape
        self.image_shape = (channels, height, width)
        self.num_components = math.prod(image_shape)
        self.prior = prior

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the code of each image, (B, D), and the log-determinant of the map, (B,)."""
        self._check_images("x", x)
        code_and_log_det: tuple[Tensor, Tensor] = explain_input_errors(self, self._encode, x, self.image_shape[0])
        return code_and_log_det

    @abc.abstractmethod
    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what `forward` returns, for images of the right shape."""

    def inverse(self, z: Tensor) -> Tensor:
        """Compute the image of each code, (B, C, H, W)."""
        self._check_codes(z)
        images: Tensor = explain_input_errors(self, self._decode, z, None, name="z")
        return images

    @abc.abstractmethod
    def _decode(self, z: Tensor) -> Tensor:
        """Compute what `inverse` returns, for codes of the right shape."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute the log-density of each image in nats, (B,)."""
        z, log_det = self(x)
        return PRIORS[self.prior].log_prob(z).sum(1) + log_det

    def bits_per_dim(self, log_prob: Tensor, num_levels: int) -> Tensor:
        """Return the bits per component of an image, given the log-density of the dequantized image.

        Args:
            log_prob: The output of `log_prob` for images in [0, 1].
            num_levels: Number of gray levels of the original images: 256, or 17 for the data set `digits`.
        """
        check_tensor("log_prob", log_prob, hint="pass what `log_prob` returned")
        check_count("num_levels", num_levels)
        return math.log2(num_levels) - log_prob / (self.num_components * math.log(2))

    @torch.no_grad()
    def sample(self, num_samples: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw images, (num_samples, C, H, W). Values may be outside [0, 1].

        Args:
            num_samples: Number of images.
            temperature: Factor for the codes. Values below 1 give images that are more likely and less varied.
            generator: Source of random numbers. The default is PyTorch's random state.
        """
        check_count("num_samples", num_samples, most=_MOST_SAMPLES)
        _check_not_negative(temperature=temperature)
        check_generator(generator)
        z = draw(PRIORS[self.prior], (num_samples, self.num_components), next(self.parameters()), generator)
        return self.inverse(float(temperature) * z)

    def inpaint(
        self,
        x: Tensor,
        mask: Tensor,
        *,
        num_steps: int = 300,
        step_size: float = 0.1,
        noise: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Fill in the missing part of images by gradient ascent on the log-density, starting from noise in [0, 1].

        Each step computes `x <- clip(x + a (d log p / dx + noise e))` on the missing pixels, where e is standard normal
        and `a = step_size 100 / (100 + step)`.

        Args:
            x: Images, (B, C, H, W) in [0, 1]. The missing pixels are not read.
            mask: A tensor that has the shape of `x` or broadcasts to it, True or 1 where a pixel is known.
            num_steps: Number of steps.
            step_size: Size of the first step. The paper uses 0.1.
            noise: Factor for the noise. 0 means plain gradient ascent.
            generator: Source of random numbers. The default is PyTorch's random state.

        Returns:
            The images, with the known pixels unchanged.

        References:
            Dinh, Krueger and Bengio (2015), NICE, section 5.2.
        """
        self._check_images("x", x)
        check_tensor("mask", mask, hint="pass True or 1 where a pixel is known")
        check_count("num_steps", num_steps, most=_MOST_STEPS, hint="the paper uses 300")
        _check_not_negative(step_size=step_size, noise=noise)
        check_generator(generator)
        is_known = self._known(mask, x)

        def like_x(values: Literal["uniform", "normal"]) -> Tensor:
            make = torch.rand if values == "uniform" else torch.randn
            return make(x.shape, dtype=x.dtype, device=x.device, generator=generator)

        filled = torch.where(is_known, x.detach(), like_x("uniform"))
        for step in range(num_steps):
            with torch.inference_mode(False), torch.enable_grad():
                leaf = filled.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(self.log_prob(leaf).sum(), leaf)
            ascent = step_size * 100 / (100 + step) * (gradient + float(noise) * like_x("normal"))
            filled = torch.where(is_known, filled, (filled + ascent).clamp(0, 1))
        return filled

    def _check_images(self, name: str, x: Tensor) -> None:
        check_tensor(name, x)
        if x.ndim != 4 or x.shape[1:] != self.image_shape:
            shape = "(B, {}, {}, {})".format(*self.image_shape)
            raise ValueError(
                f"`{name}` (of shape {tuple(x.shape)}) must be {shape}, a batch of images of the model's shape; "
                "resize them, or build the model with another `image_shape`."
            )
        if not x.is_floating_point():
            raise TypeError(
                f"`{name}` has dtype {x.dtype}, but must be floating-point, in [0, 1]; add uniform noise, and divide "
                "gray levels by their number."
            )

    def _known(self, mask: Tensor, x: Tensor) -> Tensor:
        try:
            return mask.to(x.device, torch.bool).expand_as(x)
        except RuntimeError:
            raise ValueError(
                f"`mask` (of shape {tuple(mask.shape)}) must have the shape of `x`, {tuple(x.shape)}, or broadcast to "
                "it; one mask for all images is (H, W)."
            ) from None

    def _check_codes(self, z: Tensor) -> None:
        check_tensor("z", z)
        if z.ndim != 2 or z.shape[1] != self.num_components:
            raise ValueError(
                f"`z` (of shape {tuple(z.shape)}) must be (B, {self.num_components}), a batch of codes, as `forward` "
                "returns them."
            )
        check_floating("z", z)


def check_image_shape(image_shape: tuple[int, int, int]) -> None:
    """Raise unless `image_shape` is (C, H, W), with at least two components."""
    if not isinstance(image_shape, (tuple, list)) or len(image_shape) != 3:
        raise ValueError(f"`image_shape` (={describe(image_shape)}) must be (C, H, W), for instance (1, 8, 8).")
    for index, size in enumerate(image_shape):
        check_count(f"image_shape[{index}]", size)
    if math.prod(image_shape) < 2:
        raise ValueError(f"`image_shape` (={image_shape!r}) must have at least two components, one for each stream.")
    if math.prod(image_shape) > MOST_CHANNELS:
        raise ValueError(
            f"`image_shape` (={describe(image_shape)}) must have at most {MOST_CHANNELS:,} components, since each "
            "layer reads all of them; resize the images."
        )


def _check_not_negative(**numbers: float) -> None:
    for name, number in numbers.items():
        if not is_number(number) or number < 0:
            raise ValueError(f"`{name}` (={describe(number)}) must be a finite number, at least 0.")
