"""An invertible 1x1 convolution: a learnt permutation of channels."""

import torch
from torch import Tensor, nn

from revnet.nn._invertible import AbstractInvertible, without_autocast
from revnet.nn._permutation import check_channels


class InvertibleConv1x1(AbstractInvertible):
    """Mix channels by a learnt square matrix, the same at every place; begins as a random rotation.

    The matrix is kept as `P L (U + diag(s))`, with L and U triangular, so that its log-determinant is the sum of
    `log |s|` and costs nothing; P and the signs of s stay as they are drawn, and s cannot reach zero.

    Args:
        num_channels: Channels of the input.

    Shape:
        x: (B, num_channels, ...), with any number of places, or none. Output: the same.

    Raises:
        ValueError: `num_channels` is no positive integer. In the passes: another number of channels.

    Numerics:
        Under autocast computed as without it. The error of the inverse is that of a product, times the
        condition number of the matrix, which is 1 at first.

    References:
        Kingma and Dhariwal (2018), Glow: Generative Flow with Invertible 1x1 Convolutions, section 3.2.
    """

    permutation: Tensor
    signs: Tensor

    def __init__(self, num_channels: int):
        super().__init__()
        if isinstance(num_channels, bool) or not isinstance(num_channels, int) or num_channels < 1:
            raise ValueError(f"`num_channels` (={num_channels!r}) must be a positive integer.")
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
        dtype = torch.promote_types(x.dtype, self.lower.dtype)
        with without_autocast(x):
            lower, upper = self._factors(dtype)
            flat = x.to(dtype).reshape(len(x), self.num_channels, x.shape[2:].numel())
            return ((lower @ upper)[self.permutation] @ flat).view(x.shape)

    def inverse(self, y: Tensor) -> Tensor:
        """Take the mix apart, one triangular factor after the other."""
        check_channels(y, self.num_channels, "y")
        dtype = torch.promote_types(y.dtype, torch.float32)  # for smaller types there is no solver
        with without_autocast(y):
            lower, upper = self._factors(dtype)
            mixed = y.to(dtype).reshape(len(y), self.num_channels, y.shape[2:].numel())
            mixed = mixed[:, self.permutation.argsort()]
            mixed = torch.linalg.solve_triangular(lower, mixed, upper=False, unitriangular=True)
            return torch.linalg.solve_triangular(upper, mixed, upper=True).to(y.dtype).view(y.shape)

    def forward_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the sum of `log_scale` for every place."""
        y = self(x)
        return y, (x.shape[2:].numel() * self.log_scale.sum()).to(y.dtype).expand(len(x))

    def extra_repr(self) -> str:
        """The number of channels, for `repr`."""
        return f"{self.num_channels}"

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """L and U + diag(s)."""
        identity = torch.eye(self.num_channels, dtype=self.lower.dtype, device=self.lower.device)
        lower = self.lower.tril(-1) + identity
        upper = self.upper.triu(1) + (self.signs * self.log_scale.exp()).diag()
        return lower.to(dtype), upper.to(dtype)
