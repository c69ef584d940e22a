"""An invertible 1x1 convolution: a learned permutation of channels."""

import torch
from torch import Tensor, nn

from revnet._checks import check_count, check_floating
from revnet.nn.invertible._abstract_invertible import AbstractInvertible, without_autocast
from revnet.nn.invertible._permutation import check_channels

_MOST_CHANNELS = 2**15
"""A decomposition of a larger matrix would take hours."""


class InvertibleConv1x1(AbstractInvertible):
    """Mix channels by a learned square matrix, which is the same at every position and starts as a random rotation.

    The matrix is stored as `P L (U + diag(s))` with triangular L and U, so its log-determinant is the sum of `log |s|`
    and costs almost nothing. P and the signs of s are drawn once and stay fixed, and s cannot reach zero.

    Args:
        num_channels: Channels of the input.

    Shape:
        x: (B, num_channels, ...), with any number of additional dimensions. Output: the same.

    Raises:
        ValueError: `num_channels` is not a positive integer. In the passes: the input has another number of channels.
        TypeError: In the passes: the input is not a floating-point tensor.

    Numerics:
        Autocast does not change the result. The error of the inverse is the error of a matrix product times the
        condition number of the matrix, which is 1 at the start.

    References:
        Kingma and Dhariwal (2018), Glow: Generative Flow with Invertible 1x1 Convolutions, section 3.2.

    Example:
        >>> import torch
        >>> from revnet.nn import InvertibleConv1x1
        >>> conv, x = InvertibleConv1x1(4), torch.rand(2, 4, 3, 3)
        >>> torch.allclose(conv.inverse(conv(x)), x, atol=1e-5)
        True
    """

    permutation: Tensor
    signs: Tensor

    def __init__(self, num_channels: int):
        super().__init__()
        check_count("num_channels", num_channels, most=_MOST_CHANNELS)
        self.num_channels = num_channels
        # In float64, and from the CPU: there is no decomposition on the meta device.
        rotation, _ = torch.linalg.qr(torch.randn(num_channels, num_channels, dtype=torch.float64, device="cpu"))
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        like = torch.empty(())  # of the default type and device
        self.register_buffer("permutation", permutation.argmax(1).to(like.device))
        self.register_buffer("signs", diagonal.sign().to(like))
        self.lower = nn.Parameter(lower.tril(-1).to(like))
        self.upper = nn.Parameter(upper.triu(1).to(like))
        self.log_scale = nn.Parameter(diagonal.abs().log().to(like))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels."""
        check_channels(x, self.num_channels, "x")
        check_floating("x", x)
        dtype = torch.promote_types(x.dtype, self.lower.dtype)
        with without_autocast(x):
            lower, upper = self._factors(dtype)
            flat = x.to(dtype).reshape(x.shape[0], self.num_channels, x.shape[2:].numel())
            return ((lower @ upper)[self.permutation] @ flat).view(x.shape)

    def inverse(self, y: Tensor) -> Tensor:
        """Undo the mix, one triangular factor after the other."""
        check_channels(y, self.num_channels, "y")
        check_floating("y", y)  # Rounded to integers, the result would not be the inverse.
        dtype = torch.promote_types(y.dtype, torch.float32)  # for smaller types there is no solver
        with without_autocast(y):
            lower, upper = self._factors(dtype)
            mixed = y.to(dtype).reshape(y.shape[0], self.num_channels, y.shape[2:].numel())
            mixed = mixed[:, self.permutation.argsort()]
            mixed = torch.linalg.solve_triangular(lower, mixed, upper=False, unitriangular=True)
            return torch.linalg.solve_triangular(upper, mixed, upper=True).to(y.dtype).view(y.shape)

    def forward_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, and the sum of `log_scale` over all positions."""
        y = self(x)
        return y, (x.shape[2:].numel() * self.log_scale.sum()).to(y.dtype).expand(x.shape[0])

    def extra_repr(self) -> str:
        """Return the number of channels, for `repr`."""
        return f"{self.num_channels}"

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return L and U + diag(s)."""
        identity = torch.eye(self.num_channels, dtype=self.lower.dtype, device=self.lower.device)
        lower = self.lower.tril(-1) + identity
        upper = self.upper.triu(1) + (self.signs * self.log_scale.exp()).diag()
        return lower.to(dtype), upper.to(dtype)
