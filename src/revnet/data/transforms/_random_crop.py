"""Random crops of padded images."""

import torch
from torch import Tensor
from torch.nn import functional as F

from revnet.data.transforms._abstract_transform import AbstractTransform


class RandomCrop(AbstractTransform):
    """Pad each image with zeros and cut out a window of its original size, at its own random position.

    Args:
        padding: Zeros added on each side.
    """

    num_draws = 2

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, images: Tensor, draws: Tensor) -> Tensor:
        """Crop each image."""
        B, C, H, W = images.shape
        padded = F.pad(images, [self.padding] * 4)
        width = padded.shape[3]
        left, top = draws.mul(2 * self.padding + 1).long().unbind(1)
        window = torch.arange(H * width, device=images.device).view(H, width)[:, :W].flatten()
        # Pixels by their numbers in the padded image: one gather is faster than indexing with rows and columns.
        pixels = (top * width + left)[:, None] + window  # (B, H * W)
        return padded.flatten(2).gather(2, pixels[:, None].expand(B, C, H * W)).view(images.shape)
