"""The errors that a caller of revnet may want to handle.

Everything else is a plain `ValueError`, `TypeError` or `NotImplementedError`: a mistake in the call, to be mended
there.

* RevnetError
  x ReconstructionError       the backward pass cannot rebuild what the forward pass saw
  x DataError                 a data file or folder is missing, corrupt or of another layout
  x CheckpointError           a checkpoint is missing, truncated or of another model
  x MissingDependencyError    an optional package is not installed
"""

from typing import Self


class RevnetError(Exception):
    """Base class of every error defined here."""


class ReconstructionError(RevnetError, RuntimeError):
    """The backward pass cannot rebuild the activations of the forward pass.

    Raised in place of a wrong gradient: an output, a parameter, a buffer or an argument was modified in place since the
    forward pass, or running the residual function again did something else than it did the first time.
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
