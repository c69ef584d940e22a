"""The stratified split into a training and a validation part."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_Counts = NDArray[np.int64]


def stratified_parts(labels: Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide the indices of `labels` into a training and a validation part, each in ascending order.

    The parts equal the ones of scikit-learn's `train_test_split(..., stratify=labels)`, index by index.

    Raises:
        ValueError: `fraction` is not between 0 and 1, one of the parts would have fewer images than there are classes,
            a class has a single image, or `seed` is not in 0..2^32 - 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(
            f"`fraction` (={fraction}) must be between 0 and 1, both excluded; "
            "pass 0.1 to hold out a tenth of the training images."
        )
    _, classes, counts = np.unique(labels.numpy(), return_inverse=True, return_counts=True)
    num_validation = math.ceil(fraction * len(labels))
    num_training = len(labels) - num_validation
    reason = explain_holdout(labels, range(int(labels.max()) + 1), fraction)
    if reason:
        raise ValueError(f"`fraction` (={fraction}) {reason}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` (={seed}) must be from 0 to 2^32 - 1; 0 is usual.")
    # NumPy guarantees that the stream of the legacy generator never changes.
    random = np.random.RandomState(seed)
    num_kept = _apportion(counts, num_training, random)
    # Returns its first argument, but advances the generator where a division rounds down, as scikit-learn does.
    _apportion(counts - num_kept, num_validation, random)
    is_validation = np.ones(len(labels), dtype=bool)
    for number, (count, kept) in enumerate(zip(counts, num_kept, strict=True)):
        (members,) = np.nonzero(classes == number)
        is_validation[members[random.permutation(count)[:kept]]] = False
    return np.flatnonzero(~is_validation).tolist(), np.flatnonzero(is_validation).tolist()


def explain_holdout(labels: Tensor, class_names: Sequence[object], fraction: float) -> str | None:
    """Return why a share of the images of every class cannot be held out, and a way out; None if it can."""
    numbers, counts = np.unique(labels.numpy(), return_counts=True)
    single = numbers[counts < 2]
    if len(single):
        return (
            f"holds out images of every class, and the class '{class_names[single[0]]}' has a single training image; "
            "add images of it"
        )
    fault = _fault(len(labels), len(counts), fraction)
    if fault is None:
        return None
    smallest = math.ceil(100 * len(counts) / len(labels)) / 100
    usual = smallest if _fault(len(labels), len(counts), smallest) is None else len(counts) / len(labels)
    return f"{fault}; pass {usual:.2g}"


def _fault(num_images: int, num_classes: int, fraction: float) -> str | None:
    num_validation = math.ceil(fraction * num_images)
    num_training = num_images - num_validation
    for number, verb in ((num_validation, "holds out"), (num_training, "leaves")):
        if number < num_classes:
            images = "image" if number == 1 else "images"
            return f"{verb} {number} {images} of {num_images}, fewer than the {num_classes} classes"
    return None


def _apportion(counts: _Counts, total: int, random: np.random.RandomState) -> _Counts:
    """Divide `total` in proportion to `counts`: largest remainders are rounded up, ties are broken at random."""
    quotas = counts / counts.sum() * total
    shares = np.floor(quotas)
    remainders = quotas - shares
    num_left = int(total - shares.sum())
    for remainder in np.unique(remainders)[::-1]:
        if num_left <= 0:
            break
        (tied,) = np.nonzero(remainders == remainder)
        rounded_up = random.choice(tied, size=min(len(tied), num_left), replace=False)
        shares[rounded_up] += 1
        num_left -= len(rounded_up)
    return shares.astype(np.int64)
