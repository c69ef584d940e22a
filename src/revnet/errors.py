"""The errors that a caller of revnet may want to handle.

Everything else is a plain `ValueError`, `TypeError` or `NotImplementedError`: a mistake in the call, to be mended
there.

* RevnetError
  x ReconstructionError       the backward pass cannot rebuild what the forward pass saw
  x DataError                 a data file or folder is missing, corrupt or of another layout
  x CheckpointError           a checkpoint is missing, truncated or of another model
  x MissingDependencyError    an optional package is not installed
  x PredictionError           a model cannot be run on shapes without data
  x BudgetError               a training step cannot be made to fit a budget of memory

And one warning, ReconstructionWarning: what was rebuilt is far from what the forward pass saw.
"""

from pathlib import Path
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

    Raised in place of a wrong gradient: an output, a parameter, a buffer or an argument was modified in place since the
    forward pass, or running the residual function again did something else than it did the first time.
    """


class ReconstructionWarning(UserWarning):
    """Rebuilt activations are so far from the true ones that gradients are wrong."""


class DataError(RevnetError, ValueError):
    """A data file or folder is missing, corrupt or of another layout."""


class CheckpointError(RevnetError, ValueError):
    """A checkpoint is missing, truncated or of another model."""


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
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        return f"pip install 'revnet[{extra}]'"
    clone = "." if root == Path.cwd() else root
    return f"pip install -e '{clone}[{extra}]'"


class PredictionError(RevnetError, RuntimeError):
    """The memory of a model cannot be predicted from shapes: it fails on them, or needs the values of tensors."""


class BudgetError(RevnetError, ValueError):
    """A training step cannot be made to fit a budget of memory.

    Args:
        message: What is missing, and what would fit.
        missing_bytes: By how much the budget is too small.
        least_bytes: The least that the step needs under any plan.
        max_batch_size: The largest batch that would fit; 0 if none does.
    """

    def __init__(self, message: str, *, missing_bytes: int = 0, least_bytes: int = 0, max_batch_size: int = 0):
        super().__init__(message)
        self.missing_bytes = missing_bytes
        self.least_bytes = least_bytes
        self.max_batch_size = max_batch_size
