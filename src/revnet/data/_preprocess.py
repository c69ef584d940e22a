"""From uint8 pixels to the float input of a network."""

from difflib import get_close_matches

import torch
from torch import Tensor, nn

from revnet.data._base import AbstractSplit, ImageSplit
from revnet.errors import DataError

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Of red, green and blue, on a scale of 0 to 1, as in nearly every published recipe."""
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


class Preprocess(nn.Module):
    """Compute `(images - mean) / scale`, with statistics that were taken from a data set once.

    Both are buffers in grey levels (0..255), so they move with the model and lie in its state dict, and a saved pair
    gives the same module again without the data: `Preprocess(**state)`, or `Preprocess(state["mean"], state["scale"])`.

    Args:
        mean: What is subtracted: one value a channel, (C, 1, 1), or a whole image, (C, H, W).
        scale: What is divided by, of the same shape. Positive.

    Shape:
        images: (B, C, H, W), uint8. Output: the same, in the type of the buffers: float32 unless they were cast.

    Raises:
        ValueError: `mean` and `scale` are not as above; or, in the call, the images have other channels (or, for a mean
            image, another size) than the statistics.
        TypeError: The images of a call are not uint8.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        if mean.ndim != 3 or not mean.is_floating_point() or not mean.isfinite().all():
            raise ValueError(
                f"`mean` (of shape {tuple(mean.shape)}, {mean.dtype}) must be finite floats of shape (C, 1, 1) or "
                "(C, H, W); take it from `make_preprocess` or from a saved module."
            )
        if scale.shape != mean.shape or scale.dtype != mean.dtype or not (scale.isfinite() & (scale > 0)).all():
            raise ValueError(
                f"`scale` (of shape {tuple(scale.shape)}, {scale.dtype}) must be positive, finite, and like `mean` (of "
                f"shape {tuple(mean.shape)}, {mean.dtype}); pass `torch.ones_like(mean)` to leave the scale alone."
            )
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Turn one batch of pixels into input for the network."""
        if images.dtype != torch.uint8:
            raise TypeError(
                f"`images` (={images.dtype}) must be uint8 pixels, 0 to 255; pass them as they were loaded."
            )
        # Broadcasting would let a grey image pass for a colour one.
        channels, height, width = self.mean.shape
        if images.ndim != 4 or images.shape[1] != channels or (height, width) not in (images.shape[2:], (1, 1)):
            raise ValueError(
                f"`images` (of shape {tuple(images.shape)}) must have the channels and the size that the statistics "
                f"were taken from, {tuple(self.mean.shape)} without the batch; use the data set of the training."
            )
        return (images.to(self.mean.dtype) - self.mean) / self.scale

    def extra_repr(self) -> str:
        """Shape of the statistics, for `print`."""
        return f"shape={tuple(self.mean.shape)}"


def make_preprocess(kind: str, train: AbstractSplit, test: AbstractSplit) -> Preprocess:
    """Take the statistics of a data set, or those that are in use for its kind.

    `standardize` subtracts the mean of each channel over all training pixels and divides by their standard deviation
    (dividing by N), the modern choice. Scaling the pixels to 0..1 first, as is often written, gives the same numbers.

    `mean_image` is what the RevNet paper's code does for CIFAR: the mean image of *training and test* images together
    is subtracted, pixel by pixel, and the pixels stay on the 0-255 scale. It looks at the test images (not at their
    labels); take it to compare with the paper.

    `imagenet` standardizes with the means and deviations of ImageNet's channels that nearly everybody uses, and
    `unit_range` brings 0..255 to -1..1, as the RevNet paper's code does for ImageNet. Both look at no image.

    Args:
        kind: "standardize", "mean_image", "imagenet" or "unit_range".
        train: The training images, all of them: a held-out part must not change the statistics.
        test: The test images; read by `mean_image` only.

    Raises:
        ValueError: `kind` is unknown, needs images in memory and these are not, or needs RGB and these are not.
        DataError: A channel is constant over all training images, so that it cannot be standardized.

    Numerics:
        Sums are exact, in integers; the statistics are float64 until they are stored as float32.

    References:
        Gomez et al. (2017), The Reversible Residual Network; official code, renmengye/revnet-public, the input of
        CIFAR and that of ImageNet.
    """
    match kind:
        case "standardize":
            return _standardize(_in_memory(kind, "train", train))
        case "mean_image":
            return _mean_image(_in_memory(kind, "train", train), _in_memory(kind, "test", test))
        case "imagenet":
            return _imagenet(train)
        case "unit_range":
            centre = torch.full((train.image_shape[0], 1, 1), 127.5)
            return Preprocess(centre, centre)
    kinds = ["standardize", "mean_image", "imagenet", "unit_range"]
    close = get_close_matches(kind, kinds, n=1)
    raise ValueError(
        f"`kind` (='{kind}') must be one of {', '.join(kinds)}" + (f"; did you mean '{close[0]}'?" if close else ".")
    )


def _in_memory(kind: str, name: str, split: AbstractSplit) -> ImageSplit:
    if not isinstance(split, ImageSplit):
        raise ValueError(
            f"`kind` (='{kind}') takes statistics of all images, but those of `{name}` do not lie in memory; pass "
            "'imagenet' or 'unit_range'."
        )
    return split


def _imagenet(train: AbstractSplit) -> Preprocess:
    num_channels = train.image_shape[0]
    if num_channels != 3:
        raise ValueError(
            f"`kind` (='imagenet') is for RGB images, but those of `train` have {num_channels} channels; pass "
            "'unit_range' or 'standardize'."
        )
    # To the float32 nearest to each product.
    mean, scale = (torch.tensor(x, dtype=torch.float64) * 255 for x in (_IMAGENET_MEAN, _IMAGENET_DEVIATION))
    return Preprocess(mean.float().view(-1, 1, 1), scale.float().view(-1, 1, 1))


def _standardize(train: ImageSplit) -> Preprocess:
    # A histogram a channel: exact, and no float copy of the whole split.
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
        for chunk in images.split(1000):  # `sum` makes an int64 copy of its input first
            total += chunk.sum(0, dtype=torch.int64)
    mean = (total.double() / (len(train) + len(test))).float()
    return Preprocess(mean, torch.ones_like(mean))
