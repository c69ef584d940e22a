"""A scale and a shift for each channel, which start from the statistics of the first images."""

import torch
from torch import Tensor, nn

from revnet._checks import MOST_CHANNELS, check_count, check_floating
from revnet.nn.invertible._abstract_invertible import AbstractInvertible, without_autocast
from revnet.nn.invertible._permutation import check_channels

_EPSILON = 1e-6  # as in the code of Glow; a channel that is constant in the first batch gets a large but finite scale


class ActNorm(AbstractInvertible):
    """Scale and shift each channel: `y = exp(log_scale) x + bias`. The normalization layer of Glow.

    A new layer is the identity. `initialize_act_norms` sets its parameters once, before training, so that each channel
    of the first batch has mean 0 and deviation 1. From then on they are ordinary parameters: unlike batch norm, the
    layer treats each sample on its own, and computes the same in training and in evaluation. The buffer
    `is_initialized` records whether the parameters are set, and is part of the state dict.

    Args:
        num_channels: Channels of the input.

    Shape:
        x: (B, num_channels, ...), with any number of additional dimensions. Output: the same.

    Raises:
        ValueError: `num_channels` is not a positive integer. In the passes: the input has another number of channels.
        TypeError: In the passes: the input is not a floating-point tensor.

    References:
        Kingma and Dhariwal (2018), Glow: Generative Flow with Invertible 1x1 Convolutions, section 3.1.

    Example:
        >>> import torch
        >>> from revnet.nn import ActNorm, initialize_act_norms
        >>> norm, x = ActNorm(2), 5 + 3 * torch.randn(64, 2, 4, 4)
        >>> initialize_act_norms(norm, x)
        >>> torch.allclose(norm(x).mean((0, 2, 3)), torch.zeros(2), atol=1e-5)
        True
    """

    is_initialized: Tensor

    def __init__(self, num_channels: int):
        super().__init__()
        check_count("num_channels", num_channels, most=MOST_CHANNELS)
        self.num_channels = num_channels
        self.log_scale = nn.Parameter(torch.zeros(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("is_initialized", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift the channels."""
        log_scale, bias = self._parameters_for(x, "x")
        with without_autocast(x):
            return torch.addcmul(bias, x, log_scale.exp())

    def inverse(self, y: Tensor) -> Tensor:
        """Undo the shift and the scale."""
        log_scale, bias = self._parameters_for(y, "y")
        with without_autocast(y):
            return (y - bias) * (-log_scale).exp()

    def forward_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, and the sum of `log_scale` over all positions."""
        y = self(x)
        return y, (x.shape[2:].numel() * self.log_scale.sum()).to(y.dtype).expand(x.shape[0])

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the parameters so that each channel of `x` gets mean 0 and deviation 1, unless they are already set."""
        check_channels(x, self.num_channels, "x")
        if self.is_initialized:
            return
        log_scale, bias = normalizing_values(x)
        self.log_scale.copy_(log_scale)
        self.bias.copy_(bias)
        self.is_initialized.fill_(True)

    def extra_repr(self) -> str:
        """Return the number of channels, for `repr`."""
        return f"{self.num_channels}"

    def _parameters_for(self, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Return scale and bias in the dtype of `x`, in a shape that broadcasts to it."""
        check_channels(x, self.num_channels, name)
        check_floating(name, x)
        shape = (-1, *[1] * (x.dim() - 2))
        return self.log_scale.to(x.dtype).view(shape), self.bias.to(x.dtype).view(shape)


def normalizing_values(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale, as its logarithm, and the bias that give each channel of `x` mean 0 and deviation 1, (C,).

    Raises:
        TypeError: `x` is not floating-point.
        ValueError: `x` is empty, or contains NaN or inf.
    """
    check_floating("x", x)
    if not x.numel() or not x.isfinite().all():
        raise ValueError(
            f"`x` (of shape {tuple(x.shape)}) must have values, all of them finite, to normalize the channels; pass a "
            "batch of valid images to `initialize_act_norms`."
        )
    values = x.detach().to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1).flatten(1)
    deviation = values.std(1, correction=0) + _EPSILON
    return -deviation.log(), -values.mean(1) / deviation
