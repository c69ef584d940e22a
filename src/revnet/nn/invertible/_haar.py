"""Downsampling by the Haar wavelet."""

import torch
from torch import Tensor

from revnet._checks import check_floating
from revnet.nn.invertible._abstract_invertible import (
    AbstractInvertible,
    check_halvable,
    check_multiple,
    without_autocast,
    zero_log_det,
)


class HaarWavelet(AbstractInvertible):
    """Split an image into its mean and its horizontal, vertical and diagonal differences, each of half the size.

    The transform is orthonormal, so it preserves lengths and volumes. Channels are ordered by band: all channels of the
    means, then of the differences between columns, between rows, and along the diagonals. The first half of the
    channels is the smooth part of the image, and the second half is the rough part.

    Shape:
        x: (B, C, H, W) with even sides. Output: (B, 4 C, H / 2, W / 2).

    Raises:
        ValueError: In the passes: the input has a shape that does not fit.
        TypeError: In the passes: the input is not a floating-point tensor.

    References:
        Haar (1910), Zur Theorie der orthogonalen Funktionensysteme.
        Ardizzone et al. (2019), Guided Image Generation with Conditional Invertible Neural Networks, section 3.3.

    Example:
        >>> import torch
        >>> from revnet.nn import HaarWavelet
        >>> wavelet = HaarWavelet()
        >>> y = wavelet(torch.ones(1, 1, 2, 2))
        >>> y.flatten()
        tensor([2., 0., 0., 0.])
        >>> wavelet.inverse(y).flatten()
        tensor([1., 1., 1., 1.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Compute the four bands."""
        check_halvable(x, 2)
        check_floating("x", x)  # The matrix would be rounded to zero for integers.
        B, C, H, W = x.shape
        squares = x.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(B, 4, C * H * W // 4)
        return self._mix(squares).reshape(B, 4 * C, H // 2, W // 2)

    def inverse(self, y: Tensor) -> Tensor:
        """Compute the image from its four bands."""
        check_multiple(y, 4)
        check_floating("y", y)
        B, C, H, W = y.shape
        squares = self._mix(y.reshape(B, 4, C * H * W // 4)).reshape(B, 2, 2, C // 4, H, W)
        return squares.permute(0, 3, 4, 1, 5, 2).reshape(B, C // 4, 2 * H, 2 * W)

    def forward_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, and zeros, because a rotation preserves volumes."""
        return self(x), zero_log_det(x)

    def _mix(self, squares: Tensor) -> Tensor:
        with without_autocast(squares):  # Rounding to low precision could not be undone.
            return _matrix(squares) @ squares


def _matrix(like: Tensor) -> Tensor:
    """Return the matrix that turns four pixels into four bands, and back.

    It is not a buffer: a model that is built on the meta device would not get it back from its state dict.
    """
    index = torch.arange(2, dtype=like.dtype, device=like.device)
    pair = 1 - 2 * torch.outer(index, index)  # [[1, 1], [1, -1]], the sum and the difference
    return torch.kron(pair, pair) / 2
