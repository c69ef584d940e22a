"""Cutout: one square of every image is set to zero."""

import torch
from torch import Tensor

from revnet.data.transforms._abstract_transform import AbstractTransform


class Cutout(AbstractTransform):
    """Set one square to zero in each image, centered on a random pixel.

    Near the border, part of the square is outside, so some images lose less; the authors found that this matters.
    Zero is the mean of a preprocessed batch.

    Args:
        side: Side of the square, in pixels.

    References:
        DeVries and Taylor (2017), Improved Regularization of Convolutional Neural Networks with Cutout.
    """

    num_draws = 2

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor, draws: Tensor) -> Tensor:
        """Cut a square out of each image."""
        B, _, H, W = images.shape
        in_rows = self._is_covered(draws[:, 0], H).view(B, 1, H, 1)
        in_columns = self._is_covered(draws[:, 1], W).view(B, 1, 1, W)
        return images.masked_fill(in_rows & in_columns, 0)

    def _is_covered(self, draw: Tensor, length: int) -> Tensor:
        first = draw.mul(length).long()[:, None] - self.side // 2
        index = torch.arange(length, device=draw.device)
        return (index >= first) & (index < first + self.side)  # (B, length)
