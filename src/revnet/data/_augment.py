"""Random crops and flips, drawn anew for every image of a batch."""

from typing import Any

from torch import Tensor, nn

from revnet.data._optional import require


class Augment(nn.Module):
    """Apply random transforms to a training batch; in eval mode, return the batch unchanged.

    Args:
        transforms: kornia augmentations, applied in order.
        image_size: Height and width that the transforms were made for.

    Shape:
        images: (B, C, H, W), floating point. Output: the same.

    Raises:
        TypeError: The images of a call are not floating point.
        ValueError: They are not of `image_size`.
    """

    def __init__(self, transforms: Any, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.transforms = nn.Sequential(*transforms)
        self.image_size = image_size

    def forward(self, images: Tensor) -> Tensor:
        """Augment one batch."""
        if not self.training:
            return images
        if not images.is_floating_point():
            raise TypeError(f"`images` (={images.dtype}) must be floating point; apply `Preprocess` first.")
        # kornia would resize what is too small, without a word.
        if images.shape[2:] != self.image_size:
            raise ValueError(
                f"`images` (of shape {tuple(images.shape)}) must be of the size {self.image_size} that this "
                "augmentation was made for; pass their size to `make_augment`."
            )
        return self.transforms(images)


def make_augment(crop_padding: int, horizontal_flip: bool, image_size: tuple[int, int]) -> nn.Module:
    """The augmentation of the CIFAR recipes: a random crop of the padded image, then a flip in half of the cases.

    Apply it after `Preprocess`, as the paper's code does: the border is zero on the network's scale, that is, as bright
    as the mean and not black. The paper pads by 2 pixels a side; 4 is the usual choice today. Every image has its own
    draw, taken from PyTorch's global CPU generator wherever the batch lies, so `torch.manual_seed` fixes it.

    Args:
        crop_padding: Zeros added on each side before a window of `image_size` is cut out. 0 to leave out the crop.
        horizontal_flip: Mirror each image left to right with probability 1/2. Wrong for digits and letters.
        image_size: Height and width of the images.

    Returns:
        A module for a float batch, active in training mode only; `nn.Identity` when nothing is asked for.

    Raises:
        ValueError: `crop_padding` is negative, or `image_size` not positive.
        MissingDependencyError: kornia is not installed.

    References:
        Gomez et al. (2017), The Reversible Residual Network; official code, renmengye/revnet-public, the CIFAR input.
    """
    if crop_padding < 0:
        raise ValueError(f"`crop_padding` (={crop_padding}) must not be negative; pass 0 to leave out the crop.")
    height, width = image_size
    if height < 1 or width < 1:
        raise ValueError(f"`image_size` (={image_size}) must be positive; pass (height, width).")
    if crop_padding == 0 and not horizontal_flip:
        return nn.Identity()
    kornia = require("kornia.augmentation", package="kornia", purpose="augmentation")
    transforms = []
    if crop_padding > 0:
        transforms.append(kornia.RandomCrop((height, width), padding=crop_padding))
    if horizontal_flip:
        transforms.append(kornia.RandomHorizontalFlip(p=0.5))
    return Augment(transforms, (height, width))
