"""One bound on the reconstruction error for a whole model."""

from torch import nn

from revnet.nn._sequential import ReversibleSequential


def set_tolerance(model: nn.Module, tolerance: float | None) -> None:
    """Bound the reconstruction error of all reversible sequences of `model`; the next forward pass follows it.

    Args:
        model: A model with reversible sequences.
        tolerance: As in `ReversibleSequential`: a relative error such as 1e-3, or None for no bound.

    Raises:
        ValueError: `model` has no reversible sequence, or `tolerance` is no relative error.
    """
    sequences = [module for module in model.modules() if isinstance(module, ReversibleSequential)]
    if not sequences:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no reversible sequence whose error could be bounded; build it of "
            "`ReversibleSequential`."
        )
    for sequence in sequences:
        sequence.tolerance = tolerance
