"""Setting a part of the training images aside, the same share of every class."""

import numpy as np
from torch import Tensor

from revnet.data._optional import require


def stratified_parts(labels: Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide the indices of `labels` into those that train and those that validate, each in ascending order.

    Raises:
        ValueError: `fraction` is not between 0 and 1, or one of the parts would have fewer images than there are
            classes, or `seed` is not in 0..2^32 - 1.
        MissingDependencyError: scikit-learn is not installed.
    """
    if not 0 < fraction < 1:
        raise ValueError(
            f"`fraction` (={fraction}) must lie between 0 and 1, both excluded; "
            "pass 0.1 to hold out a tenth of the training images."
        )
    selection = require("sklearn.model_selection", package="scikit-learn", purpose="holding out a validation part")
    try:
        training, validation = selection.train_test_split(
            np.arange(len(labels)), test_size=float(fraction), random_state=seed, stratify=labels.numpy()
        )
    except ValueError as error:
        raise ValueError(
            f"`fraction` (={fraction}) and `seed` (={seed}) do not split {len(labels)} images of "
            f"{len(labels.unique())} classes: {str(error).rstrip('.')}; pass another fraction or seed."
        ) from error
    return sorted(training.tolist()), sorted(validation.tolist())
