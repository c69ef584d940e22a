"""The additive coupling, the default: `y = x + residual`.

References:
    Gomez et al. (2017), The Reversible Residual Network, equations 6 and 7.
    Dinh et al. (2015), NICE: Non-linear Independent Components Estimation.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from revnet._checks import check_bool, check_tensor
from revnet.coupling._abstract import AbstractCoupling
from revnet.coupling._check import check_residual


@dataclass(frozen=True)
class Additive(AbstractCoupling):
    """The additive coupling in floating point: `y = x + residual`. This is the default, and the paper's coupling.

    Accuracy: each block rebuilds its input up to half a unit in the last place.

    Example:
        >>> import torch
        >>> from revnet import Additive
        >>> coupling = Additive()
        >>> y = coupling.forward(torch.tensor([1.0]), torch.tensor([0.5]), "f")
        >>> coupling.inverse(y, torch.tensor([0.5]), "f")
        tensor([1.])
    """

    is_additive: ClassVar[bool] = True

    def prepare(self, x: Tensor) -> Tensor:
        """Return the stream unchanged."""
        return x

    def forward(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Return `x + residual`."""
        return additive(x, residual, name)

    def inverse(self, y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
        """Return `y - residual`."""
        return additive_inverse(y, residual, name, in_place=in_place)

    def log_det(self, x: Tensor, residual: Tensor) -> None:
        """Return None: the log-determinant is zero."""

    def limit(self, dtype: torch.dtype) -> None:
        """Return None: reversal rounds at every magnitude."""


def additive(x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
    """Add a residual to a stream: `y = x + residual`.

    Args:
        x: The stream. Not modified.
        residual: The output of the residual function. It has the shape of `x` and a dtype that promotes to the dtype
            of `x`.
        name: The name of the residual function, for error messages.

    Returns:
        `y`, with the shape and dtype of `x`.

    Raises:
        TypeError: `x` or `residual` is not a tensor, or the dtype of `residual` would change the dtype of the stream.
        ValueError: `residual` has a different shape.

    Example:
        >>> import torch
        >>> from revnet.coupling._additive import additive
        >>> additive(torch.tensor([1.0]), torch.tensor([0.5]))
        tensor([1.5000])
    """
    if not isinstance(x, Tensor):
        check_tensor("x", x)
    check_residual(x, residual, name)
    return x + residual


def additive_inverse(y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
    """Subtract the residual that `additive` added: `x = y - residual`.

    Args:
        y: The stream after `additive`. With `in_place`, it is overwritten and returned.
        residual: The residual that `additive` added.
        name: The name of the residual function, for error messages.
        in_place: Whether to write the result into `y`, which allocates no memory. Use it only if nothing else reads
            `y`.

    Raises:
        TypeError: `y` or `residual` is not a tensor, `in_place` is not a bool, or the dtype of `residual` would change
            the dtype of the stream.
        ValueError: `residual` has a different shape.

    Numerics:
        Floating-point addition rounds, so the result equals the original `x` up to half a unit in the last place of
        `y`.

    Example:
        >>> import torch
        >>> from revnet.coupling._additive import additive_inverse
        >>> additive_inverse(torch.tensor([1.5]), torch.tensor([0.5]))
        tensor([1.])
    """
    if not isinstance(y, Tensor):
        check_tensor("y", y)
    if in_place is not True and in_place is not False:
        check_bool(in_place=in_place)
    check_residual(y, residual, name)
    return y.sub_(residual) if in_place else y - residual
