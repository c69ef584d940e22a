"""Random horizontal flips."""

import torch
from torch import Tensor, nn


class RandomHorizontalFlip(nn.Module):
    """Mirror each image left to right with probability 1/2.

    The draws come from PyTorch's global CPU generator on every device. The module acts in evaluation mode
    too; `make_augment` disables it there.

    Shape:
        images: (B, C, H, W). Output: the same.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Flip half of the images."""
        is_flipped = (torch.rand(len(images)) < 0.5).to(images.device)
        return torch.where(is_flipped[:, None, None, None], images.flip(3), images)
