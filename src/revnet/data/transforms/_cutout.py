"""Cutout: one square of every image is set to zero."""

import torch
from torch import Tensor, nn


class Cutout(nn.Module):
    """Set one square to zero in each image, centered on a random pixel.

    Near the border, part of the square is outside, so some images lose less; the authors found that this matters.
    Zero is the mean of a preprocessed batch. The draws come from PyTorch's global CPU generator on every device. The
    module acts in evaluation mode too; `make_augment` disables it there.

    Args:
        side: Side of the square, in pixels.

    Shape:
        images: (B, C, H, W). Output: the same.

    References:
        DeVries and Taylor (2017), Improved Regularization of Convolutional Neural Networks with Cutout.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        """Cut a square out of each image."""
        B, _, H, W = images.shape
        in_rows = self._is_covered(torch.randint(H, (B, 1)), H).to(images.device).view(B, 1, H, 1)
        in_columns = self._is_covered(torch.randint(W, (B, 1)), W).to(images.device).view(B, 1, 1, W)
        return images.masked_fill(in_rows & in_columns, 0)

    def _is_covered(self, center: Tensor, length: int) -> Tensor:
        first = center - self.side // 2
        index = torch.arange(length)
        return (index >= first) & (index < first + self.side)  # (B, length)
