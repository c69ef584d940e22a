"""RandAugment, by kornia."""

from typing import Any

import torch
from torch import Tensor, nn

from revnet.data.transforms._color_distortion import make_color_distortion
from revnet.data.transforms.augment import NoAugment
from revnet.errors import MissingDependencyError
from revnet.training.classification.config import TrainConfig

_NUM_OPERATIONS = 2


class RandAugment(nn.Module):
    """Apply two random operations to the pixels of training images.

    The operations are drawn for each batch, and their strengths and signs for each image, from PyTorch's generator.

    Args:
        magnitude: Strength of the operations, 1 to 30.

    Shape:
        images: (B, 3, H, W), uint8. Output: the same.

    Raises:
        MissingDependencyError: kornia is not installed.

    References:
        Cubuk et al. (2020), RandAugment: Practical Automated Data Augmentation with a Reduced Search Space.
    """

    def __init__(self, magnitude: int) -> None:
        super().__init__()
        try:
            from kornia.augmentation.auto import RandAugment as KorniaRandAugment
        except ModuleNotFoundError as error:
            raise MissingDependencyError.of("kornia", "`randaugment`") from error
        self._operations: Any = KorniaRandAugment(n=_NUM_OPERATIONS, m=magnitude)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Augment one batch; in evaluation mode, return it unchanged."""
        if not self.training:
            return images
        augmented = self._operations(images.float() / 255)
        return (augmented * 255).round().clamp(0, 255).to(torch.uint8)


class InOrder(nn.Module):
    """Apply several augmentations of pixels, one after another.

    Args:
        augmentations: Modules of images and their keys.
    """

    def __init__(self, *augmentations: nn.Module) -> None:
        super().__init__()
        self.augmentations = nn.ModuleList(augmentations)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Augment one batch."""
        for augmentation in self.augmentations:
            images = augmentation(images, keys)
        return images


def make_distortion(config: TrainConfig, num_channels: int) -> nn.Module:
    """Return the augmentation of the pixels that `config` asks for.

    Raises:
        ValueError: RandAugment is on, and the images are not RGB.
        MissingDependencyError: kornia is not installed.
    """
    augmentations: list[nn.Module] = [make_color_distortion()] if config.color_distortion else []
    if config.randaugment:
        if num_channels != 3:
            raise ValueError(
                f"`randaugment` (={config.randaugment}) is for RGB images, and the data have {num_channels} "
                f"channel{'s' * (num_channels != 1)}; leave it out."
            )
        augmentations.append(RandAugment(config.randaugment))
    return InOrder(*augmentations) if augmentations else NoAugment()
