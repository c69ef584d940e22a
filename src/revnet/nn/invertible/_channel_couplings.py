"""Couplings of a flow step that change a stream by parameters alone: a scale and shift, and a matrix.

Their functions return parameters and ignore the stream that they read.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from revnet.coupling import AbstractCoupling
from revnet.nn.invertible._abstract_invertible import without_autocast


@dataclass(frozen=True)
class ChannelScale(AbstractCoupling):
    """Scale and shift each channel: `y = exp(log_scale) x + bias`. The residual is `log_scale` and `bias`, (2, C)."""

    is_additive: ClassVar[bool] = False

    def prepare(self, x: Tensor) -> Tensor:
        """Return the stream unchanged."""
        return x

    def forward(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Return `exp(log_scale) x + bias`."""
        log_scale, bias = _per_channel(residual, x, name)
        return torch.addcmul(bias, x, log_scale.exp())

    def inverse(self, y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
        """Return `exp(-log_scale) (y - bias)`."""
        log_scale, bias = _per_channel(residual, y, name)
        scale = (-log_scale).exp()
        return y.sub_(bias).mul_(scale) if in_place else (y - bias) * scale

    def log_det(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the sum of `log_scale` over all positions, for each sample."""
        return (x.shape[2:].numel() * residual[0].sum()).to(x.dtype).expand(x.shape[0])

    def limit(self, dtype: torch.dtype) -> None:
        """Return None: reversal rounds at every magnitude."""


@dataclass(frozen=True)
class ChannelMatrix(AbstractCoupling):
    """Mix the channels of one stream: `y = L U x`.

    The residual is (C, C): below the diagonal it holds L, whose diagonal is one, and from the diagonal on it holds U.
    """

    is_additive: ClassVar[bool] = False

    def prepare(self, x: Tensor) -> Tensor:
        """Return the stream unchanged."""
        return x

    def forward(self, x: Tensor, residual: Tensor, name: str = "f") -> Tensor:
        """Return `L U x`."""
        check_stream(x, residual.shape[1], f"`{name}`")
        with without_autocast(x):
            packed = residual.to(x.dtype)
            return mix_channels(_unit_lower(packed) @ packed.triu(), x)

    def inverse(self, y: Tensor, residual: Tensor, name: str = "f", *, in_place: bool = False) -> Tensor:
        """Solve for `x`, one triangular factor after the other."""
        check_stream(y, residual.shape[1], f"`{name}`")
        dtype = torch.promote_types(y.dtype, torch.float32)  # the solver does not support smaller types
        with without_autocast(y):
            packed = residual.to(dtype)
            x = y.to(dtype).reshape(y.shape[0], y.shape[1], y.shape[2:].numel())
            x = torch.linalg.solve_triangular(packed, x, upper=False, unitriangular=True)
            x = torch.linalg.solve_triangular(packed, x, upper=True).to(y.dtype).view(y.shape)
        return y.copy_(x) if in_place else x

    def log_det(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the sum of the logarithms of the diagonal of U over all positions, for each sample."""
        log_scale = residual.diagonal().abs().log().sum()
        return (x.shape[2:].numel() * log_scale).to(x.dtype).expand(x.shape[0])

    def limit(self, dtype: torch.dtype) -> None:
        """Return None: reversal rounds at every magnitude."""


def check_stream(x: Tensor, num_channels: int, what: str) -> None:
    """Raise unless `x` is a real stream with the channels that `what` is built for. Parameters could broadcast."""
    if x.dim() < 2 or x.shape[1] != num_channels:
        raise ValueError(
            f"{what} is built for {2 * num_channels} channels, {num_channels} in each stream, but a stream is of shape "
            f"{tuple(x.shape)}; pass `num_channels` of the input when you build the `FlowStep`."
        )
    if x.is_complex():
        raise TypeError(f"{what} got a stream of dtype {x.dtype}, but a `FlowStep` needs real ones.")


def mix_channels(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply the channels at every position by a matrix.

    Shape:
        matrix: (N, C). x: (B, C, ...). Output: (B, N, ...).
    """
    flat = x.reshape(x.shape[0], x.shape[1], x.shape[2:].numel())
    return (matrix @ flat).view(x.shape[0], len(matrix), *x.shape[2:])


def _per_channel(residual: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    check_stream(x, residual.shape[1], f"`{name}`")
    log_scale, bias = residual.to(x.dtype).view(2, -1, *[1] * (x.dim() - 2)).unbind()
    return log_scale, bias


def _unit_lower(packed: Tensor) -> Tensor:
    return packed.tril(-1) + torch.eye(len(packed), dtype=packed.dtype, device=packed.device)
