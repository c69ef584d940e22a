"""One bound on the reconstruction error for a whole model."""

from torch import nn

from revnet._checks import check_module, describe, is_number
from revnet.nn._sequential import ReversibleSequential


def set_tolerance(model: nn.Module, tolerance: float | None) -> None:
    """Bound the reconstruction error of all reversible sequences of `model`. The next forward pass follows it.

    Args:
        model: A model that contains reversible sequences.
        tolerance: A relative error such as 1e-3, as in `ReversibleSequential`, or None for no bound.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` has no reversible sequence, or `tolerance` is not a relative error.
    """
    check_module("model", model)
    if tolerance is not None and not (is_number(tolerance) and 0 < tolerance < 1):
        # Checked here, because assigning a module or a parameter would register it instead of calling the setter.
        raise ValueError(
            f"`tolerance` (={describe(tolerance)}) must be a relative error between 0 and 1, such as 1e-3, or None."
        )
    sequences = [module for module in model.modules() if isinstance(module, ReversibleSequential)]
    if not sequences:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no reversible sequence whose error could be bounded; build it of "
            "`ReversibleSequential`."
        )
    for sequence in sequences:
        sequence.tolerance = tolerance
