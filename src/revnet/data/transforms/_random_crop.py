"""Random crops of padded images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RandomCrop(nn.Module):
    """Pad each image with zeros and cut out a window of its original size, at its own random position.

    The draws come from PyTorch's global CPU generator on every device. The module acts in evaluation mode
    too; `make_augment` disables it there.

    Args:
        padding: Zeros added on each side.

    Shape:
        images: (B, C, H, W). Output: the same.
    """

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, images: Tensor) -> Tensor:
        """Crop each image."""
        B, _, H, W = images.shape
        # One copy to the device for both draws.
        left, top = torch.rand(2, B).mul(2 * self.padding + 1).long().to(images.device)
        rows = top[:, None] + torch.arange(H, device=images.device)  # (B, H)
        columns = left[:, None] + torch.arange(W, device=images.device)  # (B, W)
        image = torch.arange(B, device=images.device)
        padded = F.pad(images, [self.padding] * 4)
        # Indexing puts the channels last, since a slice stands between the indices.
        return padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
