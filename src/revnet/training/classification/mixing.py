"""Mixup and CutMix: training images made of two images, with targets to match."""

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn import functional as F

from revnet.training.classification.config import TrainConfig


class Mix:
    """Mix every image of a batch with its neighbor.

    All images of a batch have the same share, which is drawn from PyTorch's global CPU generator. If both kinds of
    mixing are on, a coin decides for each batch.

    Args:
        num_classes: Number of classes.
        mixup: Parameter of the Beta distribution of the share, for blending images; 0 does not blend.
        cutmix: The same for pasting a rectangle; 0 does not paste.

    Shape:
        images: (B, C, H, W), floating point, and labels: (B,), int64. Output: images of that shape and targets, the
            share of each class, (B, num_classes).

    References:
        Zhang et al. (2018), mixup: Beyond Empirical Risk Minimization.
        Yun et al. (2019), CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features.
    """

    def __init__(self, num_classes: int, mixup: float, cutmix: float) -> None:
        self._num_classes = num_classes
        self._mixup = mixup
        self._cutmix = cutmix

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images and their targets."""
        pastes = self._cutmix > 0 and (self._mixup == 0 or bool(torch.rand(()) < 0.5))
        alpha = self._cutmix if pastes else self._mixup
        share = float(Beta(alpha, alpha).sample())
        others = images.roll(1, 0)
        if pastes:
            mask = _rectangle(images, 1 - share)
            share = 1 - float(mask.mean())  # the rectangle may be partly outside
            images = torch.where(mask.bool().to(images.device), others, images)
        else:
            images = images.lerp(others, 1 - share)
        targets = F.one_hot(labels, self._num_classes).to(images.dtype)
        return images, targets.lerp(targets.roll(1, 0), 1 - share)


def make_mix(config: TrainConfig, num_classes: int) -> Mix | None:
    """Return the mixing of `config`; None if there is none."""
    if config.mixup == 0 and config.cutmix == 0:
        return None
    return Mix(num_classes, config.mixup, config.cutmix)


def _rectangle(images: Tensor, area: float) -> Tensor:
    """Return a mask, (H, W), that is 1 in a rectangle of this area around a random point, as far as it is inside."""
    mask = torch.zeros(images.shape[2:])
    corners = []
    for side, center in zip(mask.shape, torch.rand(2).tolist(), strict=True):
        half = side * area**0.5 / 2
        corners.append(slice(max(0, round(center * side - half)), max(0, round(center * side + half))))
    mask[tuple(corners)] = 1
    return mask
