"""Cutout: a square of every image set to zero."""

import torch
from torch import Tensor, nn


class Cutout(nn.Module):
    """Set one square to zero in each image, centred on a pixel drawn at random.

    Near the border a part of the square lies outside, so some images lose less: the authors found that this matters.
    Zero is the mean once a batch is preprocessed. The draws come from PyTorch's global CPU generator, wherever the
    images lie. It acts in evaluation mode too: `make_augment` sees to that.

    Args:
        side: Of the square, in pixels.

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
        in_rows = self._covered(torch.randint(H, (B, 1)), H).to(images.device).view(B, 1, H, 1)
        in_columns = self._covered(torch.randint(W, (B, 1)), W).to(images.device).view(B, 1, 1, W)
        return images.masked_fill(in_rows & in_columns, 0)

    def _covered(self, centre: Tensor, length: int) -> Tensor:
        first = centre - self.side // 2
        place = torch.arange(length)
        return (place >= first) & (place < first + self.side)  # (B, length)
