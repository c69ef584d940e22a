"""NICE: a density of images, from reversible blocks.

The components of an image are dealt out to two streams, odd and even; additive coupling layers, each a perceptron,
update one stream from the other in turns; a diagonal scaling ends it. The map is a bijection whose log-determinant is
the sum of the log-scales, so that the density of an image is known exactly: that of its code under the prior. Two
coupling layers are one reversible block, so their activations are computed again in the backward pass.

B C H W: batch, channels, height, width; D = C H W, the components of an image and of its code.

References:
    Dinh, Krueger and Bengio (2015), NICE: Non-linear Independent Components Estimation, sections 3 and 5.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from revnet.models._checks import check_choice, check_positive
from revnet.models._prior import PRIORS, PriorName, draw
from revnet.nn import AbstractPolicy, Reverse, ReversibleBlock, ReversibleSequential, as_policy


class CouplingFunction(nn.Sequential):
    """The function m of a coupling layer: a perceptron with ReLU units. Its last layer begins at zero.

    Shape:
        x: (B, in_features). Output: (B, out_features).
    """

    def __init__(self, in_features: int, out_features: int, *, hidden_dim: int, num_hidden: int):
        layers: list[nn.Module] = []
        for index in range(num_hidden):
            layers += [nn.Linear(in_features if index == 0 else hidden_dim, hidden_dim), nn.ReLU()]
        last = nn.Linear(hidden_dim, out_features)
        # Every coupling begins as the identity, from which deep flows train more safely (Kingma and Dhariwal, 2018).
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(*layers, last)


class NICE(nn.Module):
    """A density of images, and a way to draw from it.

    The defaults are the paper's network for MNIST but for the first: 4 coupling layers of 5 hidden layers of 1000
    units. For CIFAR-10 it has 4 hidden layers of 2000 units.

    Args:
        image_shape: C, H, W of the images.
        num_couplings: Coupling layers; even, since a reversible block consists of two.
        hidden_dim: Units of each hidden layer.
        num_hidden: Hidden layers of each coupling layer.
        prior: The law of a code's components: "logistic", which the paper takes for most data sets, or "gaussian".
        policy: What to do with the activations of the blocks, `Reverse()` by default; `Store()` makes the stored twin.

    Shape:
        x: (B, C, H, W), in [0, 1], with uniform noise as wide as a grey level added (*dequantised*).
        z: (B, D).

    Raises:
        TypeError: `policy` is no policy.
        ValueError: A count is not positive, `num_couplings` is odd, `image_shape` has fewer than two components, or
            there is no such prior. In the forward pass: the images have another shape.

    Numerics:
        `inverse` gives images back up to the rounding of one addition and subtraction a coupling, and of the scaling:
        to 1e-6 in float32, where the functions return no more than the size of the images.

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
        check_positive(num_couplings=num_couplings, hidden_dim=hidden_dim, num_hidden=num_hidden)
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
        """Compute the code of each image, (B, D), and the log-determinant of the map that led there, (B,)."""
        self._check_images("x", x)
        components = x.flatten(1)
        y1, y2 = self.couplings((components[:, 0::2], components[:, 1::2]))
        z = torch.cat((y1, y2), 1) * self.log_scale.exp()
        return z, self.log_scale.sum().expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        """Compute the image of each code, (B, C, H, W)."""
        if z.ndim != 2 or z.shape[1] != self.num_components:
            raise ValueError(
                f"`z` (of shape {tuple(z.shape)}) must be (B, {self.num_components}), a batch of codes, as `forward` "
                "returns them."
            )
        y = z * (-self.log_scale).exp()
        x1, x2 = self.couplings.inverse((y[:, : (z.shape[1] + 1) // 2], y[:, (z.shape[1] + 1) // 2 :]))
        if x1.shape != x2.shape:  # An odd number of components: the first stream has one more.
            return torch.cat((torch.stack((x1[:, :-1], x2), 2).flatten(1), x1[:, -1:]), 1).view(-1, *self.image_shape)
        return torch.stack((x1, x2), 2).view(-1, *self.image_shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute the log-density of each image in nats, (B,)."""
        z, log_det = self(x)
        return PRIORS[self.prior].log_prob(z).sum(1) + log_det

    def bits_per_dim(self, log_prob: Tensor, num_levels: int) -> Tensor:
        """Bits for each component of an image, from the log-density of the dequantised image.

        Args:
            log_prob: What `log_prob` returned for images in [0, 1].
            num_levels: Grey levels of the images as they were: 256, or 17 for the digits of scikit-learn.
        """
        check_positive(num_levels=num_levels)
        return math.log2(num_levels) - log_prob / (self.num_components * math.log(2))

    @torch.no_grad()
    def sample(self, num_samples: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw images, (num_samples, C, H, W); values may lie outside of [0, 1].

        Args:
            num_samples: How many.
            temperature: What codes are multiplied by: below 1, images that are likelier and less varied.
            generator: Where random numbers come from; PyTorch's random state by default.
        """
        check_positive(num_samples=num_samples)
        _check_not_negative(temperature=temperature)
        z = draw(PRIORS[self.prior], (num_samples, self.num_components), self.log_scale, generator)
        return self.inverse(temperature * z)

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
        """Fill in the missing part of images by climbing the log-density, from noise, within [0, 1].

        `x <- clip(x + a (d log p / dx + noise e))` on the missing pixels, e standard normal, the step shrinking as
        `a = step_size 100 / (100 + step)`.

        Args:
            x: Images, (B, C, H, W) in [0, 1]; what is missing is not read.
            mask: Of `x`'s shape, or one that broadcasts to it: True or 1 where a pixel is known.
            num_steps: How many steps.
            step_size: The first step; the paper's is 0.1.
            noise: What the noise is multiplied by; 0 climbs straight.
            generator: Where random numbers come from; PyTorch's random state by default.

        Returns:
            The images, with the known pixels as they were.

        References:
            Dinh, Krueger and Bengio (2015), NICE, section 5.2.
        """
        self._check_images("x", x)
        check_positive(num_steps=num_steps)
        _check_not_negative(step_size=step_size, noise=noise)
        is_known = self._known(mask, x)

        def like_x(values: Literal["uniform", "normal"]) -> Tensor:
            make = torch.rand if values == "uniform" else torch.randn
            return make(x.shape, dtype=x.dtype, device=x.device, generator=generator)

        filled = torch.where(is_known, x.detach(), like_x("uniform"))
        for step in range(num_steps):
            with torch.inference_mode(False), torch.enable_grad():
                leaf = filled.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(self.log_prob(leaf).sum(), leaf)
            ascent = step_size * 100 / (100 + step) * (gradient + noise * like_x("normal"))
            filled = torch.where(is_known, filled, (filled + ascent).clamp(0, 1))
        return filled

    def _check_images(self, name: str, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1:] != self.image_shape:
            shape = "(B, {}, {}, {})".format(*self.image_shape)
            raise ValueError(
                f"`{name}` (of shape {tuple(x.shape)}) must be {shape}, a batch of the images that the model is built "
                "for; resize them, or build the model with another `image_shape`."
            )
        if not x.is_floating_point():
            raise TypeError(
                f"`{name}` has dtype {x.dtype}, but must be floating-point, in [0, 1]; divide grey levels by their "
                "number, after adding uniform noise."
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
        raise ValueError(f"`image_shape` (={image_shape!r}) must be (C, H, W), for instance (1, 8, 8).")
    for index, size in enumerate(image_shape):
        check_positive(**{f"image_shape[{index}]": size})
    if math.prod(image_shape) < 2:
        raise ValueError(
            f"`image_shape` (={image_shape!r}) has one component, but at least two are needed, one for each stream."
        )


def _check_not_negative(**numbers: float) -> None:
    for name, number in numbers.items():
        if not (isinstance(number, int | float) and math.isfinite(number) and number >= 0):
            raise ValueError(f"`{name}` (={number!r}) must be a finite number, not below 0.")


def nice(
    *,
    image_shape: tuple[int, int, int],
    num_couplings: int = 4,
    hidden_dim: int = 1000,
    num_hidden: int = 5,
    prior: PriorName = "logistic",
    policy: AbstractPolicy | str | None = None,
) -> NICE:
    """NICE for images of `image_shape`, with the paper's network for MNIST: 19,158,352 parameters there."""
    return NICE(
        image_shape=image_shape,
        num_couplings=num_couplings,
        hidden_dim=hidden_dim,
        num_hidden=num_hidden,
        prior=prior,
        policy=policy,
    )
