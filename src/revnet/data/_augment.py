"""Random crops, flips and erased squares, drawn anew for every image of a batch."""

from collections.abc import Sequence

from torch import Tensor, nn

from revnet.data._cutout import Cutout
from revnet.data._optional import require


class Augment(nn.Module):
    """Apply random transforms to a training batch; in eval mode, return the batch unchanged.

    Args:
        transforms: Modules from batch to batch, applied in order.
        image_size: Height and width that the transforms were made for.

    Shape:
        images: (B, C, H, W), floating point. Output: the same.

    Raises:
        TypeError: The images of a call are not floating point.
        ValueError: They are not of `image_size`.
    """

    def __init__(self, transforms: Sequence[nn.Module], image_size: tuple[int, int]) -> None:
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


def make_augment(
    crop_padding: int, horizontal_flip: bool, image_size: tuple[int, int], *, cutout: int = 0
) -> nn.Module:
    """The augmentation of the CIFAR recipes: a random crop of the padded image, a flip in half of the cases, a cutout.

    Apply it after `Preprocess`, as the paper's code does: the border is zero on the network's scale, that is, as bright
    as the mean and not black. The paper pads by 2 pixels a side; 4 is the usual choice today. Every image has its own
    draw, taken from PyTorch's global CPU generator wherever the batch lies, so `torch.manual_seed` fixes it.

    Args:
        crop_padding: Zeros added on each side before a window of `image_size` is cut out. 0 to leave out the crop.
        horizontal_flip: Mirror each image left to right with probability 1/2. Wrong for digits and letters.
        image_size: Height and width of the images.
        cutout: Side of a square that is set to zero in each image, at a random place and in part outside of it; 16 is
            usual for CIFAR-10, 8 for CIFAR-100. 0 to leave it out.

    Returns:
        A module for a float batch, active in training mode only; `nn.Identity` when nothing is asked for.

    Raises:
        ValueError: `crop_padding` or `cutout` is negative, a cutout could erase a whole image, or `image_size` is not
            positive.
        MissingDependencyError: kornia is not installed, which crops and flips.

    References:
        Gomez et al. (2017), The Reversible Residual Network; official code, renmengye/revnet-public, the CIFAR input.
        DeVries and Taylor (2017), Improved Regularization of Convolutional Neural Networks with Cutout.
    """
    if crop_padding < 0:
        raise ValueError(f"`crop_padding` (={crop_padding}) must not be negative; pass 0 to leave out the crop.")
    height, width = image_size
    if height < 1 or width < 1:
        raise ValueError(f"`image_size` (={image_size}) must be positive; pass (height, width).")
    if not 0 <= cutout < min(height, width):
        raise ValueError(
            f"`cutout` (={cutout}) must be at least 0, and below the shorter side of `image_size` (={image_size}), or "
            "else it could erase whole images; pass 0 to leave it out."
        )
    transforms: list[nn.Module] = []
    if crop_padding > 0 or horizontal_flip:
        kornia = require("kornia.augmentation", package="kornia", purpose="augmentation")
        if crop_padding > 0:
            transforms.append(kornia.RandomCrop((height, width), padding=crop_padding))
        if horizontal_flip:
            transforms.append(kornia.RandomHorizontalFlip(p=0.5))
    if cutout > 0:
        transforms.append(Cutout(cutout))
    return Augment(transforms, (height, width)) if transforms else nn.Identity()
