"""Weights of classes with few images, in the loss or in the choice of images."""

import torch
from torch import Tensor

from revnet.data import ImageDataset
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.training.classification.config import TrainConfig


def class_weights(config: TrainConfig, training: AbstractSplit, dataset: ImageDataset) -> Tensor | None:
    """Return the weight of each class in the training loss; None if all weigh the same.

    Raises:
        ValueError: The number of weights is not the number of classes, or the classes of the images are unknown.
    """
    if config.class_weights is None:
        return None
    if config.class_weights == "balanced":
        counts = _counts("class_weights", training, dataset.num_classes)
        # The mean over the images is 1. A class without images has no loss.
        return (len(training) / (counts.clamp(min=1) * (counts > 0).sum())).float()
    if len(config.class_weights) != dataset.num_classes:
        raise ValueError(
            f"`class_weights` (={list(config.class_weights)}) must be {dataset.num_classes} numbers, one for each "
            f"class ({', '.join(dataset.class_names[:3])}, ...), or balanced."
        )
    return torch.tensor(config.class_weights, dtype=torch.float32)


def sampling_weights(config: TrainConfig, training: AbstractSplit) -> Tensor | None:
    """Return the weight of each image in the choice of training images; None if each comes once in an epoch.

    Raises:
        ValueError: The classes of the images are unknown.
    """
    if not config.balanced_sampling:
        return None
    counts = _counts("balanced_sampling", training, 0)
    assert training.labels is not None
    return 1 / counts[training.labels]


def _counts(name: str, training: AbstractSplit, num_classes: int) -> Tensor:
    """Return the number of training images of each class, float64."""
    if training.labels is None:
        raise ValueError(
            f"`{name}` needs the classes of all images in advance, and these come as a stream; download the data into "
            "a folder, or leave it out."
        )
    return torch.bincount(training.labels, minlength=num_classes).double()
