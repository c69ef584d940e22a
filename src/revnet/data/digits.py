"""The embedded default: 1,797 real hand-written digits, shipped inside scikit-learn."""

import torch
from torch import Tensor

from revnet.data._base import ImageDataset, ImageSplit
from revnet.data._optional import require

_NUM_TEST = 360
"""A fifth of the images; 1,437 remain for training."""

_SPLIT_SEED = 0
"""Part of the data set's definition: another seed makes another data set, and accuracies can no longer be compared."""

_WHITE = 16
"""The brightest of the 17 grey levels: every pixel counts the ink in a block of 4x4 of the scanned image."""


def load_digits() -> ImageDataset:
    """Hand-written digits: 1,437 images for training and 360 for testing, grey, 8x8, ten classes.

    The source has no split of its own, so one is fixed here: stratified, by scikit-learn's `train_test_split` with a
    recorded seed. The grey levels 0..16 are spread over 0..255, rounded to whole numbers, so that pixels mean the same
    in every data set of this package; no two levels fall together.

    Raises:
        MissingDependencyError: scikit-learn is not installed.

    References:
        Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning Repository. This is
        its test part, from 13 writers, who appear in both splits.
    """
    sklearn_datasets = require("sklearn.datasets", package="scikit-learn", purpose="the data set `digits`")
    selection = require("sklearn.model_selection", package="scikit-learn", purpose="the data set `digits`")
    digits = sklearn_datasets.load_digits()
    images = torch.from_numpy(digits.images).mul(255 / _WHITE).round().to(torch.uint8).unsqueeze(1)  # (N, 1, 8, 8)
    labels = torch.from_numpy(digits.target).to(torch.int64)
    train, test = selection.train_test_split(
        range(len(labels)), test_size=_NUM_TEST, random_state=_SPLIT_SEED, stratify=digits.target
    )
    return ImageDataset(
        name="digits",
        train=_select(images, labels, train),
        test=_select(images, labels, test),
        class_names=tuple(str(name) for name in digits.target_names),
    )


def _select(images: Tensor, labels: Tensor, indices: list[int]) -> ImageSplit:
    where = torch.tensor(sorted(indices))
    return ImageSplit(images[where], labels[where])
