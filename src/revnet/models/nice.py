"""NICE: a density model of images, built from reversible blocks.

The odd components of an image form one stream, and the even components the other. Additive coupling layers, each a
perceptron, update the streams alternately, and a diagonal scaling comes last. The map is a bijection whose
log-determinant is the sum of the log-scales, so the density of an image follows exactly from the density of its code
under the prior. Two coupling layers form one reversible block, so the backward pass computes their activations again.

B C H W: batch, channels, height, width; D = C H W: the number of components of an image and of its code.

References:
    Dinh, Krueger and Bengio (2015), NICE: Non-linear Independent Components Estimation, sections 3 and 5.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from revnet._checks import (
    MOST_CHANNELS,
    MOST_LAYERS,
    check_choice,
    check_count,
    check_counts,
    check_generator,
    check_tensor,
    describe,
    is_number,
)
from revnet.models._checks import explain_input_errors
from revnet.models._prior import PRIORS, PriorName, draw
from revnet.nn import AbstractPolicy, Reverse, ReversibleBlock, ReversibleSequential
from revnet.nn.policies._has_policies import as_policy

_MOST_STEPS = 1_000_000
_MOST_SAMPLES = 1_000_000


class CouplingFunction(nn.Sequential):
    """The function m of a coupling layer: a perceptron with ReLU units. Its last layer is initialized to zero.

    Shape:
        x: (B, in_features). Output: (B, out_features).
    """

    def __init__(self, in_features: int, out_features: int, *, hidden_dim: int, num_hidden: int):
        layers: list[nn.Module] = []
        for index in range(num_hidden):
            layers += [nn.Linear(in_features if index == 0 else hidden_dim, hidden_dim), nn.ReLU()]
        last = nn.Linear(hidden_dim, out_features)
        # Each coupling starts as the identity, which stabilizes the training of deep flows (Kingma and Dhariwal, 2018).
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(*layers, last)


class NICE(nn.Module):
    """A density of images that can also be sampled.

    The defaults, except for `image_shape`, are the paper's network for MNIST: 4 coupling layers with 5 hidden layers of
    1000 units each. For CIFAR-10 the paper uses 4 hidden layers of 2000 units.

    Args:
        image_shape: Shape of the images, (C, H, W).
        num_couplings: Number of coupling layers. It is even, because a reversible block consists of two.
        hidden_dim: Units of each hidden layer.
        num_hidden: Number of hidden layers in each coupling layer.
        prior: Distribution of the components of a code: "logistic", which the paper uses for most data sets, or
            "gaussian".
        policy: Policy for the activations of the blocks, or its name. The default is `Reverse()`. `Store()` makes the
            stored twin.

    Shape:
        x: (B, C, H, W) in [0, 1], *dequantized* by adding uniform noise that is as wide as one gray level.
        z: (B, D).

    Raises:
        TypeError: `policy` is not a policy. In the passes: the input is not a floating-point tensor.
        ValueError: A count is not positive, `num_couplings` is odd, `image_shape` has fewer than two components, or no
            prior or policy has this name. In the passes: the input has another shape.

    Numerics:
        `inverse` restores images up to the rounding of the scaling and of one addition and subtraction per coupling.
        In float32 the error is about 1e-6 if the functions return values that are not larger than the images.

    References:
        Dinh, Krueger and Bengio (2015), NICE: Non-linear Independent Components Estimation.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_couplings: int = 4,
        hidden_dim: int = 1000,
        num_hidden: int = 5,
        prior: PriorName = "logistic",
        policy: AbstractPolicy | str | None = None,
    ):
        super().__init__()
        _check_image_shape(image_shape)
        check_counts(num_couplings=num_couplings, num_hidden=num_hidden, most=MOST_LAYERS)
        check_count("hidden_dim", hidden_dim, most=MOST_CHANNELS)
        check_choice("prior", prior, tuple(PRIORS))
        if num_couplings % 2:
            raise ValueError(
                f"`num_couplings` (={num_couplings}) must be even, since a reversible block consists of two; use "
                f"{num_couplings + 1}."
            )
        self.image_shape = tuple(image_shape)
        self.num_components = math.prod(image_shape)
        self.prior = prior
        odd, even = self.num_components - self.num_components // 2, self.num_components // 2
        sizes = {"hidden_dim": hidden_dim, "num_hidden": num_hidden}
        self.couplings = ReversibleSequential(
            *[
                ReversibleBlock(CouplingFunction(even, odd, **sizes), CouplingFunction(odd, even, **sizes))
                for _ in range(num_couplings // 2)
            ],
            policy=Reverse() if policy is None else as_policy(policy),
        )
        self.log_scale = nn.Parameter(torch.zeros(self.num_components))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the code of each image, (B, D), and the log-determinant of the map, (B,)."""
        self._check_images("x", x)
        z = explain_input_errors(self, self._encode, x, self.image_shape[0])
        return z, self.log_scale.sum().expand(len(x))

    def _encode(self, x: Tensor) -> Tensor:
        components = x.flatten(1)
        y1, y2 = self.couplings((components[:, 0::2], components[:, 1::2]))
        return torch.cat((y1, y2), 1) * self.log_scale.exp()

    def inverse(self, z: Tensor) -> Tensor:
        """Compute the image of each code, (B, C, H, W)."""
        check_tensor("z", z)
        if z.ndim != 2 or z.shape[1] != self.num_components:
            raise ValueError(
                f"`z` (of shape {tuple(z.shape)}) must be (B, {self.num_components}), a batch of codes, as `forward` "
                "returns them."
            )
        y = z * (-self.log_scale).exp()
        x1, x2 = self.couplings.inverse((y[:, : (z.shape[1] + 1) // 2], y[:, (z.shape[1] + 1) // 2 :]))
        if x1.shape != x2.shape:  # With an odd number of components the first stream has one more.
            return torch.cat((torch.stack((x1[:, :-1], x2), 2).flatten(1), x1[:, -1:]), 1).view(-1, *self.image_shape)
        return torch.stack((x1, x2), 2).view(-1, *self.image_shape)

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
        z = draw(PRIORS[self.prior], (num_samples, self.num_components), self.log_scale, generator)
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


def _check_image_shape(image_shape: tuple[int, int, int]) -> None:
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
