"""What the codes of a density model are drawn from: independent components of one law."""

import abc
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PriorName = Literal["logistic", "gaussian"]


class AbstractPrior(abc.ABC):
    """A law for each component of a code."""

    @abc.abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """The log-density of each component, in nats."""

    @abc.abstractmethod
    def from_uniform(self, u: Tensor) -> Tensor:
        """The value below which a share of `u` lies: uniform numbers become draws."""


@dataclass(frozen=True)
class LogisticPrior(AbstractPrior):
    """The logistic law, with heavier tails than the normal one; NICE's choice for images."""

    def log_prob(self, z: Tensor) -> Tensor:
        """-log(1 + exp(z)) - log(1 + exp(-z))."""
        return -F.softplus(z) - F.softplus(-z)

    def from_uniform(self, u: Tensor) -> Tensor:
        """log(u / (1 - u))."""
        return torch.logit(u)


@dataclass(frozen=True)
class GaussianPrior(AbstractPrior):
    """The standard normal law."""

    def log_prob(self, z: Tensor) -> Tensor:
        """-(z^2 + log(2 pi)) / 2."""
        return -0.5 * (z.square() + math.log(2 * math.pi))

    def from_uniform(self, u: Tensor) -> Tensor:
        """The normal quantile."""
        return torch.special.ndtri(u)


PRIORS: dict[str, AbstractPrior] = {"logistic": LogisticPrior(), "gaussian": GaussianPrior()}


def draw(
    prior: AbstractPrior, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw codes of `shape`, on the device and in the dtype of `like`."""
    u = torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator)
    # Zero is drawn now and then, and one can be rounded to: both stand for codes at infinity.
    tiny = torch.finfo(like.dtype).eps
    return prior.from_uniform(u.clamp(tiny, 1 - tiny))
