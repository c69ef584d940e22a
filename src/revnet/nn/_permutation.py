"""A fixed order of channels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from revnet.nn._invertible import AbstractInvertible, zero_log_det


class ChannelPermutation(AbstractInvertible):
    """Put channels in another order, so that the next coupling splits them otherwise.

    Args:
        num_channels: Channels of the input.
        order: Which channel comes first, second and so on; None draws an order from PyTorch's random state. It is part
            of the state dict.

    Shape:
        x: (B, num_channels, ...). Output: the same.

    Raises:
        ValueError: `order` does not hold each channel once. In the passes: another number of channels.
    """

    order: Tensor

    def __init__(self, num_channels: int, order: Sequence[int] | None = None):
        super().__init__()
        if isinstance(num_channels, bool) or not isinstance(num_channels, int) or num_channels < 1:
            raise ValueError(f"`num_channels` (={num_channels!r}) must be a positive integer.")
        if order is not None and sorted(order) != list(range(num_channels)):
            raise ValueError(
                f"`order` (={list(order)}) must hold each of the {num_channels} channels once, counted from 0; pass "
                "None for a random order."
            )
        self.num_channels = num_channels
        self.register_buffer("order", torch.randperm(num_channels) if order is None else torch.tensor(list(order)))

    def forward(self, x: Tensor) -> Tensor:
        """Put the channels in order."""
        return self._checked(x, "x").index_select(1, self.order)

    def inverse(self, y: Tensor) -> Tensor:
        """Put them back."""
        return self._checked(y, "y").index_select(1, self.order.argsort())

    def forward_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and zeros: nothing but places change."""
        return self(x), zero_log_det(x)

    def extra_repr(self) -> str:
        """The number of channels, for `repr`."""
        return f"{self.num_channels}"

    def _checked(self, x: Tensor, name: str) -> Tensor:
        return check_channels(x, self.num_channels, name)


def check_channels(x: Tensor, num_channels: int, name: str) -> Tensor:
    """The tensor, if it has as many channels."""
    if x.dim() < 2 or x.shape[1] != num_channels:
        raise ValueError(
            f"`{name}` (of shape {tuple(x.shape)}) must be (B, {num_channels}, ...), a batch with the {num_channels} "
            "channels that the layer is built for."
        )
    return x
