"""Random horizontal flips."""

import torch
from torch import Tensor

from revnet.data.transforms._abstract_transform import AbstractTransform


class RandomHorizontalFlip(AbstractTransform):
    """Mirror each image left to right with probability 1/2."""

    num_draws = 1

    def forward(self, images: Tensor, draws: Tensor) -> Tensor:
        """Flip half of the images."""
        is_flipped = draws[:, 0] < 0.5
        return torch.where(is_flipped[:, None, None, None], images.flip(3), images)
