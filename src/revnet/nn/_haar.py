"""Down-sampling by the Haar wavelet."""

import torch
from torch import Tensor

from revnet.nn._invertible import AbstractInvertible, check_halvable, check_multiple, without_autocast, zero_log_det


class HaarWavelet(AbstractInvertible):
    """Split an image into its mean and its horizontal, vertical and diagonal differences, each of half the size.

    Orthonormal, so that lengths and volumes stay. Channels are ordered by band: all channels of the means, then those
    of the differences between columns, between rows, and along the diagonals: halves of the channels are the smooth
    and the rough part of the image.

    Shape:
        x: (B, C, H, W), even sides. Output: (B, 4 C, H / 2, W / 2).

    Raises:
        ValueError: In the passes: the shape cannot be divided.

    References:
        Haar (1910), Zur Theorie der orthogonalen Funktionensysteme.
        Ardizzone et al. (2019), Guided Image Generation with Conditional Invertible Neural Networks, section 3.3.
    """

    matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]  # symmetric: its own inverse, halved
        self.register_buffer("matrix", torch.tensor(signs) / 2, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the four bands."""
        check_halvable(x, 2)
        B, C, H, W = x.shape
        squares = x.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(B, 4, C * H * W // 4)
        return self._mix(squares).reshape(B, 4 * C, H // 2, W // 2)

    def inverse(self, y: Tensor) -> Tensor:
        """Compute the image from its four bands."""
        check_multiple(y, 4)
        B, C, H, W = y.shape
        squares = self._mix(y.reshape(B, 4, C * H * W // 4)).reshape(B, 2, 2, C // 4, H, W)
        return squares.permute(0, 3, 4, 1, 5, 2).reshape(B, C // 4, 2 * H, 2 * W)

    def forward_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and zeros: a rotation."""
        return self(x), zero_log_det(x)

    def _mix(self, squares: Tensor) -> Tensor:
        with without_autocast(squares):  # which would round what can be undone
            return self.matrix.to(squares.dtype) @ squares
