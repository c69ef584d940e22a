"""The embedded default: 1,797 real handwritten digits, shipped in this package.

`digits.npz` holds three arrays: `levels`, the gray levels 0..16, (1797, 8, 8), uint8; `labels`, (1797,), uint8; and
`test_indices`, the ascending indices of the 360 test images, uint16. `digits_license.txt` states source and license.
"""

from importlib.resources import files

import numpy as np
import torch

from revnet.data.splits.image_dataset import ImageDataset
from revnet.data.splits.image_split import ImageSplit

_WHITE = 16
"""Brightest of the 17 gray levels. Every pixel counts the ink in a block of 4x4 pixels of the scanned image."""


def load_digits() -> ImageDataset:
    """Load handwritten digits: 1,437 images for training and 360 for testing, gray, 8x8, ten classes.

    The source does not define a split, so this package fixes one. It is stratified, and equals the one of
    scikit-learn's `train_test_split(test_size=360, random_state=0, stratify=labels)`. Gray levels 0..16 are spread over
    0..255 and rounded to integers, so that pixels have the same meaning in every data set of this package; no two
    levels become equal.

    References:
        Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
        https://doi.org/10.24432/C50P49. The images are its test part, from 13 writers, who appear in both splits here.
    """
    with files("revnet.data.sources").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        levels, labels, test_indices = arrays["levels"], arrays["labels"], arrays["test_indices"]
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[test_indices] = True
    pixels = np.rint(levels * (255 / _WHITE)).astype(np.uint8)[:, None]  # (N, 1, 8, 8)
    train, test = (
        ImageSplit(torch.from_numpy(pixels[part]), torch.from_numpy(labels[part].astype(np.int64)))
        for part in (~is_test, is_test)
    )
    return ImageDataset("digits", train, test, class_names=tuple("0123456789"))
