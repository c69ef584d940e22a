"""Conversion of uint8 pixels to the float input of a network."""

from difflib import get_close_matches

import torch
from torch import Tensor, nn

from revnet._checks import check_tensor
from revnet._units import counted
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.data.splits.image_split import ImageSplit
from revnet.errors import DataError

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Means of red, green and blue on a scale of 0 to 1, as in nearly every published recipe."""
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
"""Standard deviations of red, green and blue, on the same scale."""


class Preprocess(nn.Module):
    """Compute `(images - mean) / scale`, with statistics that were computed once from a data set.

    Both are buffers in gray levels (0..255), so they move with the model and are part of its state dict. A saved pair
    gives the same module again without the data: `Preprocess(**state)`, or `Preprocess(state["mean"], state["scale"])`.

    Args:
        mean: Number subtracted from each channel, (C, 1, 1), or image subtracted from each image, (C, H, W).
        scale: Positive divisor, of the same shape.

    Shape:
        images: (B, C, H, W), uint8. Output: the same, in the dtype of the buffers: float32 unless they were cast.

    Raises:
        ValueError: `mean` or `scale` breaks a rule above, or the images of a call do not have the channels of the
            statistics (or, for a mean image, their size).
        TypeError: The images of a call are not uint8.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        if mean.ndim != 3 or not mean.is_floating_point() or not mean.isfinite().all():
            raise ValueError(
                f"`mean` (of shape {tuple(mean.shape)}, {mean.dtype}) must be finite floats of shape (C, 1, 1) or "
                "(C, H, W); get it from `make_preprocess` or from a saved module."
            )
        if scale.shape != mean.shape or scale.dtype != mean.dtype or not (scale.isfinite() & (scale > 0)).all():
            raise ValueError(
                f"`scale` (of shape {tuple(scale.shape)}, {scale.dtype}) must be positive and finite, and match `mean` "
                f"(of shape {tuple(mean.shape)}, {mean.dtype}); pass `torch.ones_like(mean)` to keep the scale."
            )
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Convert one batch of pixels to network input."""
        check_tensor("images", images, hint="pass `torch.as_tensor(images)`, (B, C, H, W)")
        if images.dtype != torch.uint8:
            raise TypeError(
                f"`images` (={images.dtype}) must be uint8 pixels, 0 to 255; pass them as they were loaded."
            )
        # Broadcasting would accept a gray image where one in color is expected.
        channels, height, width = self.mean.shape
        if images.ndim != 4 or images.shape[1] != channels or (height, width) not in (images.shape[2:], (1, 1)):
            raise ValueError(
                f"`images` (of shape {tuple(images.shape)}) must have the channels and the size of the "
                f"statistics, {tuple(self.mean.shape)} without the batch; pass images of the training data set."
            )
        return (images.to(self.mean.dtype) - self.mean) / self.scale

    def extra_repr(self) -> str:
        """Return the shape of the statistics, for `print`."""
        return f"shape={tuple(self.mean.shape)}"


def make_preprocess(kind: str, train: AbstractSplit, test: AbstractSplit) -> Preprocess:
    """Return the preprocessing with the statistics of a data set, or with the usual ones for its kind.

    `standardize` subtracts the mean of each channel over all training pixels and divides by their standard deviation
    (computed with N, not N - 1), the modern choice. Scaling the pixels to 0..1 first, as many recipes do, gives the
    same numbers.

    `mean_image` is the preprocessing of the RevNet paper's code for CIFAR: the mean image of *training and test* images
    together is subtracted, pixel by pixel, and the pixels stay on the 0-255 scale. It reads the test images (not their
    labels); use it to compare with the paper.

    `imagenet` standardizes with the usual means and deviations of ImageNet's channels, and `unit_range` maps 0..255 to
    -1..1, as the RevNet paper's code does for ImageNet. Neither reads any image.

    Args:
        kind: "standardize", "mean_image", "imagenet" or "unit_range".
        train: All training images: a held-out part must not change the statistics.
        test: Test images; read by `mean_image` only.

    Raises:
        ValueError: `kind` is unknown, needs images in memory and these are not, or needs RGB and these are not.
        DataError: A channel is constant over all training images, so it cannot be standardized.

    Numerics:
        Sums are exact, in integers; the statistics are float64 until they are stored as float32.

    References:
        Gomez et al. (2017), The Reversible Residual Network; official code, renmengye/revnet-public, the inputs of
        CIFAR and ImageNet.
    """
    match kind:
        case "standardize":
            return _standardize(_in_memory(kind, "train", train))
        case "mean_image":
            return _mean_image(_in_memory(kind, "train", train), _in_memory(kind, "test", test))
        case "imagenet":
            return _imagenet(train)
        case "unit_range":
            center = torch.full((train.image_shape[0], 1, 1), 127.5)
            return Preprocess(center, center)
    kinds = ["standardize", "mean_image", "imagenet", "unit_range"]
    close = get_close_matches(kind, kinds, n=1)
    raise ValueError(
        f"`kind` (='{kind}') must be one of {', '.join(kinds)}" + (f"; did you mean '{close[0]}'?" if close else ".")
    )


def _in_memory(kind: str, name: str, split: AbstractSplit) -> ImageSplit:
    if not isinstance(split, ImageSplit):
        raise ValueError(
            f"`kind` (='{kind}') needs all images of `{name}` in memory, but they are read from files; pass "
            "'imagenet' or 'unit_range'."
        )
    return split


def _imagenet(train: AbstractSplit) -> Preprocess:
    num_channels = train.image_shape[0]
    if num_channels != 3:
        raise ValueError(
            f"`kind` (='imagenet') is for RGB images, but `train` has images with {counted(num_channels, 'channel')}; "
            "pass 'unit_range' or 'standardize'."
        )
    # In float64 first, so that each product is rounded once.
    mean, scale = (torch.tensor(x, dtype=torch.float64) * 255 for x in (_IMAGENET_MEAN, _IMAGENET_DEVIATION))
    return Preprocess(mean.float().view(-1, 1, 1), scale.float().view(-1, 1, 1))


def _standardize(train: ImageSplit) -> Preprocess:
    # A histogram per channel is exact, and needs no float copy of the whole split.
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in train.images.unbind(1)]).double()
    weights = counts / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64)
    mean = weights @ levels
    deviation = (weights * (levels - mean[:, None]).square()).sum(1).sqrt()
    if not deviation.all():
        raise DataError(
            f"channel {int(deviation.argmin())} has the same value in every training pixel, so it cannot be "
            "standardized; leave the channel out, or use the kind 'mean_image'."
        )
    return Preprocess(mean.float().view(-1, 1, 1), deviation.float().view(-1, 1, 1))


def _mean_image(train: ImageSplit, test: ImageSplit) -> Preprocess:
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"`test` (with images {tuple(test.images.shape[1:])}) must have images of the shape of `train` "
            f"({tuple(train.images.shape[1:])}); pass two splits of one data set."
        )
    total = torch.zeros(train.images.shape[1:], dtype=torch.int64)
    for images in (train.images, test.images):
        for chunk in images.split(1000):  # `sum` first makes an int64 copy of its input
            total += chunk.sum(0, dtype=torch.int64)
    mean = (total.double() / (len(train) + len(test))).float()
    return Preprocess(mean, torch.ones_like(mean))
