"""Priors of density models: a code has independent components with one distribution."""

import abc
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PriorName = Literal["logistic", "gaussian"]


class AbstractPrior(abc.ABC):
    """Distribution of each component of a code."""

    @abc.abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density of each component, in nats."""

    @abc.abstractmethod
    def from_uniform(self, u: Tensor) -> Tensor:
        """Return the quantile function at `u`, which turns uniform numbers into samples."""


@dataclass(frozen=True)
class LogisticPrior(AbstractPrior):
    """The logistic distribution, which NICE uses for images. Its tails are heavier than normal."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Return -log(1 + exp(z)) - log(1 + exp(-z))."""
        return -F.softplus(z) - F.softplus(-z)

    def from_uniform(self, u: Tensor) -> Tensor:
        """Return log(u / (1 - u))."""
        return torch.logit(u)


@dataclass(frozen=True)
class GaussianPrior(AbstractPrior):
    """The standard normal distribution."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Return -(z^2 + log(2 pi)) / 2."""
        return -0.5 * (z.square() + math.log(2 * math.pi))

    def from_uniform(self, u: Tensor) -> Tensor:
        """Return the normal quantile."""
        return torch.special.ndtri(u)


PRIORS: dict[str, AbstractPrior] = {"logistic": LogisticPrior(), "gaussian": GaussianPrior()}


def draw(
    prior: AbstractPrior, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw codes of `shape` with the device and dtype of `like`."""
    # Lower precision has no quantile function of the normal distribution, and few numbers in the tails.
    precise = torch.promote_types(like.dtype, torch.float32)
    u = torch.rand(shape, dtype=precise, device=like.device, generator=generator)
    # `torch.rand` can return zero, and rounding can give one. Both would be codes at infinity.
    tiny = torch.finfo(precise).eps
    return prior.from_uniform(u.clamp(tiny, 1 - tiny)).to(like.dtype)
