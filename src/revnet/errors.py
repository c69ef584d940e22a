"""Errors that a caller of revnet may want to handle.

Bad arguments raise a plain `ValueError`, `TypeError` or `NotImplementedError` instead: the call itself needs a fix.

* RevnetError
  x ReconstructionError       the backward pass cannot rebuild what the forward pass saw
  x DataError                 a data file or folder is missing, corrupt or has another layout
  x CheckpointError           a checkpoint is missing, truncated or belongs to another model
  x MissingDependencyError    a package is not installed, or PyTorch is too old
  x PredictionError           a model cannot run on shapes without data
  x BudgetError               a training step does not fit into a memory budget
  x ProcessError              a process of a run on several devices was killed

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
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "kornia": "augment",
    "shtab": "completion",
    "tokenizers": "text",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
}


class RevnetError(Exception):
    """Base class of every error defined here.

    Example:
        >>> from revnet import RevnetError
        >>> from revnet.data import load_dataset
        >>> try:
        ...     load_dataset("missing/folder")
        ... except RevnetError as error:
        ...     print(type(error).__name__)
        DataError
    """


class ReconstructionError(RevnetError, RuntimeError):
    """The backward pass cannot rebuild the activations of the forward pass.

    It is raised instead of returning wrong gradients. Either an output, a parameter, a buffer or an argument was
    modified in place since the forward pass, or a residual function behaved differently when it ran again.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import ReconstructionError, ReversibleBlock
        >>> block = ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> y = block(torch.ones(1, 4))
        >>> try:
        ...     y.mul_(2).sum().backward()
        ... except ReconstructionError:
        ...     print("the output was modified before the backward pass")
        the output was modified before the backward pass
    """


class ReconstructionWarning(UserWarning):
    """Rebuilt activations are so far from the true ones that gradients are wrong.

    Example:
        >>> import warnings
        >>> from revnet import ReconstructionWarning
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", ReconstructionWarning)
        ...     ...  # train; an inaccurate reconstruction raises
        Ellipsis
    """


class DataError(RevnetError, ValueError):
    """A data file or folder is missing, corrupt or laid out differently.

    Example:
        >>> from revnet import DataError
        >>> from revnet.data import load_dataset
        >>> try:
        ...     load_dataset("missing/folder")
        ... except DataError:
        ...     print("the data set is missing")
        the data set is missing
    """


class CheckpointError(RevnetError, ValueError):
    """A checkpoint is missing, truncated or from another model.

    Example:
        >>> from revnet import CheckpointError
        >>> from revnet.training import load_classifier
        >>> try:
        ...     load_classifier("missing.ckpt")
        ... except CheckpointError:
        ...     print("the checkpoint is missing")
        the checkpoint is missing
    """


class MissingDependencyError(RevnetError, ImportError):
    """A package is not installed, or PyTorch is too old. The message contains the command that installs it.

    Example:
        >>> from revnet import MissingDependencyError
        >>> try:
        ...     from revnet.training import train
        ... except MissingDependencyError as error:
        ...     print(error)  # names the extra to install
    """

    @classmethod
    def of_torchvision(cls) -> Self:
        """Return the error for a torchvision that was built for another PyTorch, which ends the import of Lightning."""
        return cls(
            "torchvision was built for another PyTorch, such as one with CUDA next to one for the CPU; install both "
            "from one place, for instance by `pip install torch torchvision --index-url "
            "https://download.pytorch.org/whl/cpu`, or run `pip uninstall torchvision`, which revnet does not need."
        )

    @classmethod
    def of(cls, package: str, purpose: str) -> Self:
        """Return an error that says what `purpose` needs and which command installs it."""
        return cls(f"{purpose} needs {package}, which is not installed; run `{install_command(package)}`.")


_HOSTS = ("timm", "torchvision", "transformers")
"""Libraries that no extra installs."""


def install_command(package: str) -> str:
    """Return the command that installs the smallest extra with `package`, as revnet itself was installed.

    Args:
        package: Name of the distribution or of the module.

    Returns:
        The command. A library whose models revnet only works with is in no extra, and is installed by itself.
    """
    if package in _HOSTS:
        return f"pip install {package}"
    extra = _EXTRAS.get(package, "train")
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        return f"pip install 'revnet[{extra}]'"
    clone = "." if root == pathlib.Path.cwd() else root
    return f"pip install -e '{clone}[{extra}]'"


class PredictionError(RevnetError, RuntimeError):
    """The memory of a model cannot be predicted: it fails on tensors without data, or it needs their values.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import PredictionError
        >>> from revnet.memory import predict
        >>> class Normalize(nn.Module):
        ...     def forward(self, x):
        ...         return x / x.sum().item()
        >>> try:
        ...     predict(Normalize(), torch.ones(1, 2))
        ... except PredictionError:
        ...     print("`item()` needs the value of a tensor")
        `item()` needs the value of a tensor
    """


class BudgetError(RevnetError, ValueError):
    """A training step does not fit a memory budget.

    Args:
        message: The shortfall, and what would fit.
        missing_bytes: Bytes by which the budget is too small.
        least_bytes: Smallest peak of the step under any plan.
        max_batch_size: Largest batch size that fits, or 0 if none does, or if smaller batches fail.

    Example:
        >>> import torch
        >>> from revnet import BudgetError, PolicySequential
        >>> from revnet.memory import plan
        >>> from torch import nn
        >>> model = PolicySequential(nn.Linear(64, 64))
        >>> try:
        ...     plan(model, torch.ones(8, 64), budget="1 KiB")
        ... except BudgetError as error:
        ...     print(error.missing_bytes > 0, error.max_batch_size)
        True 0
    """

    def __init__(self, message: str, *, missing_bytes: int = 0, least_bytes: int = 0, max_batch_size: int = 0):
        super().__init__(message)
        self.missing_bytes = missing_bytes
        self.least_bytes = least_bytes
        self.max_batch_size = max_batch_size


class ProcessError(RevnetError, RuntimeError):
    """A process of a run was killed, or ran out of memory; on several devices, the others have ended with it.

    Example:
        >>> from revnet import ProcessError
        >>> try:
        ...     ...  # train(TrainConfig(devices=2))
        ... except ProcessError:
        ...     print("memory may have run out")
        Ellipsis
    """
