"""The errors that a caller of revnet may want to handle.

Bad arguments raise a plain `ValueError`, `TypeError` or `NotImplementedError` instead: the call itself needs a fix.

* RevnetError
  x ReconstructionError       the backward pass cannot rebuild what the forward pass saw
  x DataError                 a data file or folder is missing, corrupt or has another layout
  x CheckpointError           a checkpoint is missing, truncated or belongs to another model
  x MissingDependencyError    an optional package is not installed
  x PredictionError           a model cannot run on shapes without data
  x BudgetError               a training step does not fit into a memory budget

There is one warning, ReconstructionWarning: rebuilt activations are far from the original ones.
"""

import pathlib
from typing import Self

# The smallest extra that holds a package. All others are in `train`.
_EXTRAS = {
    "Pillow": "cli",
    "PIL": "cli",
    "pyyaml": "cli",
    "yaml": "cli",
    "rich": "cli",
    "safetensors": "cli",
    "matplotlib": "plot",
}


class RevnetError(Exception):
    """Base class of every error defined here."""


class ReconstructionError(RevnetError, RuntimeError):
    """The backward pass cannot rebuild the activations of the forward pass.

    Raised instead of returning a wrong gradient: an output, a parameter, a buffer or an argument was modified in place
    after the forward pass, or the residual function behaved differently in the second run.
    """


class ReconstructionWarning(UserWarning):
    """Rebuilt activations are so far from the true ones that gradients are wrong."""


class DataError(RevnetError, ValueError):
    """A data file or folder is missing, corrupt or has another layout."""


class CheckpointError(RevnetError, ValueError):
    """A checkpoint is missing, truncated or belongs to another model."""


class MissingDependencyError(RevnetError, ImportError):
    """An optional package is not installed; the message holds the install line."""

    @classmethod
    def of(cls, package: str, purpose: str) -> Self:
        """Return an error that says what `purpose` needs and which command installs it."""
        return cls(f"{purpose} needs {package}, which is not installed; run `{install_command(package)}`.")


def install_command(package: str) -> str:
    """Return the command that installs the smallest extra with `package`, as revnet itself was installed.

    Args:
        package: Name of the distribution or of the module.
    """
    extra = _EXTRAS.get(package, "train")
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        return f"pip install 'revnet[{extra}]'"
    clone = "." if root == pathlib.Path.cwd() else root
    return f"pip install -e '{clone}[{extra}]'"


class PredictionError(RevnetError, RuntimeError):
    """The memory of a model cannot be predicted from shapes: it fails on them, or needs the values of tensors."""


class BudgetError(RevnetError, ValueError):
    """A training step does not fit into a memory budget.

    Args:
        message: Text of the error.
        missing_bytes: Bytes that the budget lacks.
        least_bytes: Bytes that the step needs under the most frugal plan.
        max_batch_size: Largest batch that would fit; 0 if none does.
    """

    def __init__(self, message: str, *, missing_bytes: int = 0, least_bytes: int = 0, max_batch_size: int = 0):
        super().__init__(message)
        self.missing_bytes = missing_bytes
        self.least_bytes = least_bytes
        self.max_batch_size = max_batch_size
