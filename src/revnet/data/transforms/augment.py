"""Augmentation of a training batch: random crops, flips and erased squares, drawn separately for each image."""

from collections.abc import Sequence

from torch import Tensor, nn

from revnet.data._random_keys import Purpose, check_keys, uniform
from revnet.data.transforms._abstract_transform import AbstractTransform
from revnet.data.transforms._cutout import Cutout
from revnet.data.transforms._random_crop import RandomCrop
from revnet.data.transforms._random_flip import RandomHorizontalFlip


class NoAugment(nn.Identity):
    """Return a batch unchanged, with the arguments of `Augment`."""

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Return the batch."""
        return images


class Augment(nn.Module):
    """Apply random transforms to a training batch; in evaluation mode, return the batch unchanged.

    Args:
        transforms: Transforms of a batch, applied in order.
        image_size: Height and width of the images.

    Shape:
        images: (B, C, H, W), floating point. Output: the same.
        keys: (B,), int64.

    Raises:
        TypeError: The images of a call are not floating point.
        ValueError: The images of a call do not have `image_size`, or the keys are not one int64 for each image.
    """

    def __init__(self, transforms: Sequence[AbstractTransform], image_size: tuple[int, int]) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)
        self.image_size = image_size
        self._num_draws = [transform.num_draws for transform in transforms]

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Augment one batch; without keys, draw them from PyTorch's global CPU generator."""
        if not self.training:
            return images
        if not images.is_floating_point():
            raise TypeError(f"`images` (={images.dtype}) must be floating point; apply `Preprocess` first.")
        if images.shape[2:] != self.image_size:
            raise ValueError(
                f"`images` (of shape {tuple(images.shape)}) must have the size {self.image_size} of this "
                "augmentation; pass the size of the images to `make_augment`."
            )
        draws = uniform(check_keys(keys, images), sum(self._num_draws), Purpose.AUGMENT)
        for transform, own in zip(self.transforms, draws.split(self._num_draws, dim=1), strict=True):
            images = transform(images, own)
        return images


def make_augment(
    crop_padding: int, horizontal_flip: bool, image_size: tuple[int, int], *, cutout: int = 0
) -> nn.Module:
    """Return the augmentation of the CIFAR recipes: a random crop of the padded image, a random flip, and a cutout.

    Apply it after `Preprocess`, as the paper's code does: the zero border then has the brightness of the mean and is
    not black. The paper pads by 2 pixels per side; 4 is the usual choice today.

    Every image has its own draws, which are a function of its key: `augment(images, keys)` with the keys of
    `make_loader(..., keys=True)` gives the same images in any batch, in any process and on any device.
    `augment(images)` draws the keys from PyTorch's global CPU generator, so `torch.manual_seed` makes them
    reproducible.

    Args:
        crop_padding: Zeros added on each side before a window of `image_size` is cut out; 0 leaves out the crop.
        horizontal_flip: Whether to mirror each image left to right with probability 1/2. Wrong for digits and letters.
        image_size: Height and width of the images.
        cutout: Side of a square at a random position, partly outside near the border, that is set to zero in each
            image; 16 is usual for CIFAR-10, 8 for CIFAR-100, and 0 leaves it out.

    Returns:
        A module for a float batch and its keys, active in training mode only; the identity if there is nothing to do.

    Raises:
        ValueError: `crop_padding` or `cutout` is negative, or so large that whole images could become zero, or
            `image_size` is not positive.

    References:
        Gomez et al. (2017), The Reversible Residual Network; official code, renmengye/revnet-public, the CIFAR input.
        DeVries and Taylor (2017), Improved Regularization of Convolutional Neural Networks with Cutout.
    """
    height, width = image_size
    if height < 1 or width < 1:
        raise ValueError(f"`image_size` (={image_size}) must be positive; pass (height, width).")
    if not 0 <= crop_padding < min(height, width):
        raise ValueError(
            f"`crop_padding` (={crop_padding}) must be at least 0, and below the shorter side of `image_size` "
            f"(={image_size}), since a crop could otherwise hold nothing but padding; pass 0 to leave out the crop."
        )
    if not 0 <= cutout < min(height, width):
        raise ValueError(
            f"`cutout` (={cutout}) must be at least 0, and below the shorter side of `image_size` (={image_size}), "
            "since a larger square could erase whole images; pass 0 to leave it out."
        )
    transforms: list[AbstractTransform] = []
    if crop_padding > 0:
        transforms.append(RandomCrop(crop_padding))
    if horizontal_flip:
        transforms.append(RandomHorizontalFlip())
    if cutout > 0:
        transforms.append(Cutout(cutout))
    return Augment(transforms, (height, width)) if transforms else NoAugment()
