"""Read and write the two files of a run: weights (safetensors) and the checkpoint to resume from (PyTorch's format).

A weights file holds the tensors of what is trained, such as a `Classifier`, and its header as metadata. A checkpoint is
Lightning's: the same tensors with those of optimiser, schedule, callbacks and random state, and the header beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from revnet.errors import CheckpointError
from revnet.training._files import atomic_path
from revnet.training._product import Product
from revnet.training.classifier import Classifier, Header

HEADER_KEY = "revnet"  # of a checkpoint

_WAY_OUT = "pass a `.safetensors` or `.ckpt` file, or the folder of a run, that `revnet train` has written"


class SavedWeights(NamedTuple):
    """What a file holds."""

    metadata: Mapping[str, str]
    """The header."""
    tensors: dict[str, Tensor]
    """By their names in the module that was trained."""


def save_weights(product: Product, path: Path) -> None:
    """Write the tensors and the header of `product`."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in product.state_dict().items()}
    with atomic_path(path) as temporary:
        # `save_file` would make a file that only its owner may read.
        temporary.write_bytes(save(tensors, metadata=product.header.to_metadata()))


def find_weights(path: Path) -> Path:
    """Return the file of weights: `path` itself or, in the folder of a run, the last weights.

    The last weights are the default for every kind of model, as in the first line of a run's report. To use the best
    on validation, pass the path of `best.safetensors`.

    Raises:
        CheckpointError: There is no such file.
    """
    if not path.is_dir():
        return _existing_file(path)
    # The last two are written together; a run stopped in between leaves the checkpoint.
    names = ["last.safetensors", "last.ckpt"]
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise CheckpointError(f"`{path}` holds no last.safetensors and no last.ckpt; {_WAY_OUT}.")
    return found[0]


def load_classifier(path: str | Path) -> Classifier:
    """Rebuild the classifier that a run has left, on the CPU and in evaluation mode.

    Args:
        path: A `.safetensors` file, a `.ckpt` file, or the folder of a run, whose last weights are taken.

    Raises:
        CheckpointError: There is no such file, it is truncated, revnet has not written it, or its tensors do not fit
            the model that it names.
    """
    path = find_weights(Path(path))
    metadata, tensors = read_weights(path)
    return Classifier.from_tensors(Header.from_metadata(metadata, path), tensors, path).eval()


def read_weights(path: Path) -> SavedWeights:
    """Read a `.safetensors` file, or the same part of a `.ckpt` file.

    Raises:
        CheckpointError: It is missing, truncated, or not written by `revnet train`.
    """
    if path.suffix == ".ckpt":
        return trained_part(read_checkpoint(path))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise CheckpointError(f"`{path}` is truncated or not a safetensors file; {_WAY_OUT}.") from error
    return SavedWeights(metadata, tensors)


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint to resume from; nothing in it is executed.

    Raises:
        CheckpointError: It is missing, truncated, or not written by `revnet train`.
    """
    path = _existing_file(Path(path))
    with path.open("rb") as file:  # a file that may not be read says so itself
        try:
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
        except Exception as error:  # there is no saying what the unpickler stumbles over, OSError included
            raise CheckpointError(f"`{path}` is truncated or not a PyTorch checkpoint; {_WAY_OUT}.") from error
    if not (isinstance(checkpoint, dict) and {HEADER_KEY, "state_dict"} <= checkpoint.keys()):
        raise CheckpointError(f"`{path}` was not written by `revnet train`; {_WAY_OUT}.")
    return checkpoint


def trained_part(checkpoint: Mapping[str, Any]) -> SavedWeights:
    """Of a checkpoint, what the file of weights holds."""
    metadata = checkpoint[HEADER_KEY]
    prefix = f"{metadata.get('kind', 'classifier')}."  # the attribute of the task, see `_task.py`
    state = checkpoint["state_dict"].items()
    return SavedWeights(metadata, {name.removeprefix(prefix): x for name, x in state if name.startswith(prefix)})


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"`{path}` is no file; {_WAY_OUT}.")
    return path
