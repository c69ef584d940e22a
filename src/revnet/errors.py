"""Errors that a caller of revnet may want to handle.

Mistakes in a call raise a plain `ValueError`, `TypeError` or `NotImplementedError`.

* RevnetError
  x ReconstructionError       the backward pass cannot rebuild what the forward pass saw
  x DataError                 a data file or folder is missing, corrupt or laid out differently
  x CheckpointError           a checkpoint is missing, truncated or from another model
  x MissingDependencyError    an optional package is not installed
  x PredictionError           a model cannot run on shapes without data
  x BudgetError               a training step does not fit a memory budget

There is one warning, ReconstructionWarning: rebuilt activations are far from the true ones.
"""

from typing import Self


class RevnetError(Exception):
    """Base class of every error defined here."""


class ReconstructionError(RevnetError, RuntimeError):
    """The backward pass cannot rebuild the activations of the forward pass.

    It is raised instead of returning wrong gradients. Either an output, a parameter, a buffer or an argument was
    modified in place since the forward pass, or a residual function behaved differently when it ran again.

    Example:
        >>> import torch, revnet
        >>> from torch import nn
        >>> block = revnet.ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> y = block(torch.ones(1, 4))
        >>> _ = y.data.zero_(), y.add_(1)
        >>> try:
        ...     y.sum().backward()
        ... except revnet.ReconstructionError:
        ...     print("the output was modified in place")
        the output was modified in place
    """


class ReconstructionWarning(UserWarning):
    """Rebuilt activations are so far from the true ones that gradients are wrong.

    Example:
        >>> import warnings, revnet
        >>> warnings.simplefilter("error", revnet.ReconstructionWarning)
    """


class DataError(RevnetError, ValueError):
    """A data file or folder is missing, corrupt or of another layout."""


class CheckpointError(RevnetError, ValueError):
    """A checkpoint is missing, truncated or of another model."""


class MissingDependencyError(RevnetError, ImportError):
    """An optional package is not installed; the message holds the install line."""

    @classmethod
    def of(cls, package: str, purpose: str) -> Self:
        """Say that `purpose` needs `package`, and which command installs it."""
        return cls(f"{purpose} needs {package}, which is not installed; run `pip install 'revnet[train]'`.")


class PredictionError(RevnetError, RuntimeError):
    """The memory of a model cannot be predicted: it fails on tensors without data, or it needs their values."""


class BudgetError(RevnetError, ValueError):
    """A training step does not fit a memory budget.

    Args:
        message: The shortfall, and what would fit.
        missing_bytes: Bytes by which the budget is too small.
        least_bytes: Smallest peak of the step under any plan.
        max_batch_size: Largest batch size that fits, or 0 if none does.
    """

    def __init__(self, message: str, *, missing_bytes: int = 0, least_bytes: int = 0, max_batch_size: int = 0):
        super().__init__(message)
        self.missing_bytes = missing_bytes
        self.least_bytes = least_bytes
        self.max_batch_size = max_batch_size
