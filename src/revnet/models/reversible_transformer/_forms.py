"""Forms of a transformer: how the residuals of its layers are combined with its streams.

All forms have the same layers, each with a residual function f, the attention, and g, the perceptron. With
F(x) = f(x) + g(x + f(x)), the residual of a whole layer:

    stored      x[n+1] = x[n] + F(x[n])
    coupled     y1 = x1 + f(x2), y2 = x2 + g(y1)
    midpoint    x[n+1] = x[n-1] + 2 h F(x[n])
    leapfrog    x[n+1] = 2 x[n] - x[n-1] + h^2 F(x[n])

References:
    Gomez et al. (2017), The Reversible Residual Network.
    Chang et al. (2018), Reversible Architectures for Arbitrarily Deep Residual Neural Networks.
    Gal et al. (2025), Reversing Large Language Models for Efficient Training and Fine-Tuning.
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from revnet._checks import check_choice, check_positive_number
from revnet._types import Streams
from revnet.coupling import AbstractCoupling, Additive, ExactScaled, FixedPoint, Scaled
from revnet.models.reversible_transformer._residuals import LayerResidual
from revnet.models.reversible_transformer._stored_blocks import StoredBlocks
from revnet.nn import AbstractPolicy, CouplingLayer, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.nn.blocks._abstract_block import check_coupling
from revnet.nn.policies._has_policies import as_policy

Functions = tuple[nn.Module, nn.Module]
"""Residual functions f and g of a layer."""


@dataclass(frozen=True)
class AbstractForm(abc.ABC):
    """The interface of forms."""

    width_ratio: ClassVar[int] = 1
    """Features of the output, as a multiple of the features of a stream."""

    @abc.abstractmethod
    def make_blocks(self, functions: Sequence[Functions], policy: AbstractPolicy | str | None) -> nn.Module:
        """Return the layers with these residual functions, in a module."""

    @abc.abstractmethod
    def enter(self, x: Tensor) -> Tensor | Streams:
        """Return the input of the layers for the embedded tokens `x`, (B, T, D)."""

    @abc.abstractmethod
    def leave(self, y: Any, depth: int) -> Tensor:
        """Return the features in the output of `depth` layers, (B, T, width_ratio * D)."""


@dataclass(frozen=True)
class Coupled(AbstractForm):
    """The form of RevNet and the Reformer: attention updates one stream, the perceptron the other."""

    width_ratio: ClassVar[int] = 2
    coupling: AbstractCoupling

    def make_blocks(self, functions: Sequence[Functions], policy: AbstractPolicy | str | None) -> nn.Module:
        """Return a reversible block for each layer."""
        blocks = [ReversibleBlock(f, g, split_dim=-1, coupling=self.coupling) for f, g in functions]
        return ReversibleSequential(*blocks, policy=_policy_or_reverse(policy))

    def enter(self, x: Tensor) -> Tensor:
        """Return the embedded tokens, once for each stream, (B, T, 2 * D)."""
        # Concatenated, not a pair, so that the tensor that the blocks store is the one that the norm reads.
        return x.repeat(1, 1, 2)

    def leave(self, y: Any, depth: int) -> Tensor:
        """Return both streams."""
        both: Tensor = y
        return both


@dataclass(frozen=True)
class Midpoint(AbstractForm):
    """The midpoint rule, whose streams are the outputs of the last two layers."""

    coupling: AbstractCoupling

    def make_blocks(self, functions: Sequence[Functions], policy: AbstractPolicy | str | None) -> nn.Module:
        """Return a coupling layer for each layer. They update the two streams in turn."""
        blocks = [
            CouplingLayer(LayerResidual(f, g), updates=index % 2, split_dim=-1, coupling=self.coupling)  # type: ignore[arg-type]
            for index, (f, g) in enumerate(functions)
        ]
        return ReversibleSequential(*blocks, policy=_policy_or_reverse(policy))

    def enter(self, x: Tensor) -> Streams:
        """Return the embedded tokens as both of the first two outputs."""
        return x, x

    def leave(self, y: Any, depth: int) -> Tensor:
        """Return the output of the last layer."""
        last: Tensor = y[(depth - 1) % 2]
        return last


@dataclass(frozen=True)
class Leapfrog(AbstractForm):
    """The leapfrog rule, whose streams are a velocity and the output of the last layer.

    A layer computes `v <- v + h F(x)` and `x <- x + h v`. This is what `revnet.nn.LeapfrogBlock` computes, with another
    unit of the velocity: both updates have the same coupling, so that it can be an exact one.
    """

    coupling: AbstractCoupling

    def make_blocks(self, functions: Sequence[Functions], policy: AbstractPolicy | str | None) -> nn.Module:
        """Return a reversible block for each layer, whose second function is the identity."""
        blocks = [
            ReversibleBlock(LayerResidual(f, g), _Velocity(), split_dim=-1, coupling=self.coupling)
            for f, g in functions
        ]
        return ReversibleSequential(*blocks, policy=_policy_or_reverse(policy))

    def enter(self, x: Tensor) -> Streams:
        """Return a velocity of zero and the embedded tokens."""
        return torch.zeros_like(x), x

    def leave(self, y: Any, depth: int) -> Tensor:
        """Return the output of the last layer."""
        last: Tensor = y[1]
        return last


@dataclass(frozen=True)
class Stored(AbstractForm):
    """An ordinary residual network, which cannot be reversed."""

    def make_blocks(self, functions: Sequence[Functions], policy: AbstractPolicy | str | None) -> nn.Module:
        """Return an ordinary block for each layer."""
        return StoredBlocks(functions, policy=Store() if policy is None else as_policy(policy))

    def enter(self, x: Tensor) -> Tensor:
        """Return the embedded tokens."""
        return x

    def leave(self, y: Any, depth: int) -> Tensor:
        """Return the output of the last layer."""
        last: Tensor = y
        return last


def make_form(form: Any, step_size: Any, coupling: AbstractCoupling | None, default: AbstractCoupling) -> AbstractForm:
    """Return the form with this name.

    Args:
        form: Name of the form.
        step_size: The step size h; None for 1/2 in the midpoint form and 1 in the leapfrog form.
        coupling: `FixedPoint(...)` for exact arithmetic, `Additive()` for floating point. The coupled and the midpoint
            form take any other coupling as it is.
        default: Value of `coupling` if that is None, for the forms that have one.

    Raises:
        TypeError: `coupling` is not a coupling.
        ValueError: No form has this name, `step_size` is not a positive number, or the form does not have a step
            size or coupling.
    """
    check_choice("form", form, tuple(FORMS))
    if step_size is not None:
        check_positive_number("step_size", step_size, hint="1/2 is usual for the midpoint form, 1 for leapfrog")
        if form in ("coupled", "stored"):
            raise ValueError(
                f"`step_size` (={step_size!r}) must be None for the {form} form, whose layers have no step size; pass "
                "`form='midpoint'` or `form='leapfrog'`."
            )
    if coupling is not None:
        check_coupling(coupling)
    return FORMS[form](step_size, coupling, default)


def _coupled(step_size: float | None, coupling: AbstractCoupling | None, default: AbstractCoupling) -> AbstractForm:
    return Coupled(coupling or default)


def _midpoint(step_size: float | None, coupling: AbstractCoupling | None, default: AbstractCoupling) -> AbstractForm:
    return Midpoint(_scaled(Scaled.midpoint(0.5 if step_size is None else step_size), coupling or default))


def _leapfrog(step_size: float | None, coupling: AbstractCoupling | None, default: AbstractCoupling) -> AbstractForm:
    if not isinstance(coupling, Additive | FixedPoint | None):
        raise ValueError(
            f"`coupling` (={coupling}) must be `Additive()`, `FixedPoint()` or None for the leapfrog form, whose "
            "`step_size` gives the factors."
        )
    return Leapfrog(_scaled(Scaled.euler(1.0 if step_size is None else step_size), coupling or default))


def _stored(step_size: float | None, coupling: AbstractCoupling | None, default: AbstractCoupling) -> AbstractForm:
    if coupling is not None:
        raise ValueError(
            f"`coupling` (={coupling}) must be None for the stored form, which has a single stream; pass another form."
        )
    return Stored()


FORMS: dict[str, Callable[[float | None, AbstractCoupling | None, AbstractCoupling], AbstractForm]] = {
    "coupled": _coupled,
    "midpoint": _midpoint,
    "leapfrog": _leapfrog,
    "stored": _stored,
}
"""Values of `form` in `ReversibleTransformer`."""


def _scaled(scaled: Scaled, coupling: AbstractCoupling) -> AbstractCoupling:
    """Return the coupling with the factors of `scaled` in the arithmetic of `coupling`."""
    match coupling:
        case Additive():
            return Additive() if scaled == Scaled() else scaled
        case FixedPoint():
            return coupling if scaled == Scaled() else ExactScaled(scaled, coupling.fraction_bits, coupling.is_wide)
    return coupling


def _policy_or_reverse(policy: AbstractPolicy | str | None) -> AbstractPolicy:
    return Reverse() if policy is None else as_policy(policy)


class _Velocity(nn.Module):
    """The identity, which takes the arguments of a residual function."""

    def forward(self, velocity: Tensor, **kwargs: Any) -> Tensor:
        # A view: a compiled backward pass does not follow gradients through the stream itself.
        return velocity.view_as(velocity)
