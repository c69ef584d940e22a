"""A fixed permutation of the channels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from revnet._checks import MOST_CHANNELS, check_count, check_tensor, describe, is_integer
from revnet.nn.invertible._abstract_invertible import AbstractInvertible, zero_log_det


class ChannelPermutation(AbstractInvertible):
    """Reorder the channels, so that the next coupling splits them differently.

    Args:
        num_channels: Channels of the input.
        order: The channels in their new order, counted from 0. None draws an order from PyTorch's random state. The
            order is part of the state dict.

    Shape:
        x: (B, num_channels, ...). Output: the same.

    Raises:
        ValueError: `num_channels` is not a positive integer, or `order` does not hold each channel once. In the passes:
            the input has another number of channels.
        TypeError: `order` is not a sequence of integers. In the passes: the input is not a tensor.

    Example:
        >>> import torch
        >>> from revnet.nn import ChannelPermutation
        >>> ChannelPermutation(3, order=[2, 0, 1])(torch.tensor([[10, 11, 12]]))
        tensor([[12, 10, 11]])
    """

    order: Tensor

    def __init__(self, num_channels: int, order: Sequence[int] | None = None):
        super().__init__()
        check_count("num_channels", num_channels, most=MOST_CHANNELS)
        if order is not None:
            _check_order(order, num_channels)
        self.num_channels = num_channels
        self.register_buffer("order", torch.randperm(num_channels) if order is None else torch.tensor(list(order)))

    def forward(self, x: Tensor) -> Tensor:
        """Reorder the channels."""
        return self._checked(x, "x").index_select(1, self.order)

    def inverse(self, y: Tensor) -> Tensor:
        """Restore the order of the channels."""
        return self._checked(y, "y").index_select(1, self.order.argsort())

    def forward_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, and zeros, because volumes do not change."""
        return self(x), zero_log_det(x)

    def extra_repr(self) -> str:
        """Return the number of channels, for `repr`."""
        return f"{self.num_channels}"

    def _checked(self, x: Tensor, name: str) -> Tensor:
        return check_channels(x, self.num_channels, name)


def _check_order(order: Sequence[int], num_channels: int) -> None:
    if not isinstance(order, Sequence) or not all(is_integer(channel) for channel in order):
        raise TypeError(
            f"`order` (={describe(order)}) must be a sequence of integers, the channels in their new order; pass None "
            "for a random order."
        )
    if sorted(order) != list(range(num_channels)):
        raise ValueError(
            f"`order` (={describe(list(order))}) must hold each of the {num_channels} channels once, counted from 0; "
            "pass None for a random order."
        )


def check_channels(x: Tensor, num_channels: int, name: str) -> Tensor:
    """Return `x`. Raise unless it is a batch with this number of channels."""
    if not isinstance(x, Tensor):
        check_tensor(name, x)
    if x.dim() < 2 or x.shape[1] != num_channels:
        raise ValueError(
            f"`{name}` (of shape {tuple(x.shape)}) must be (B, {num_channels}, ...), a batch with the {num_channels} "
            "channels that the layer is built for."
        )
    return x
