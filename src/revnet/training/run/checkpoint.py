"""Read and write the two files of a run: weights (safetensors) and the checkpoint to resume from (PyTorch's format).

A weights file holds the tensors of the module that was trained, such as a `Classifier`, and its header as metadata. A
checkpoint is Lightning's: the same tensors, the state of optimizer, schedule, loader and callbacks, and the header. It
is a file or, if several processes shard the model, a folder of shards.
"""

import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from revnet._checks import check_path
from revnet._image_files import explain_link
from revnet._input_files import name_in_utf8
from revnet.errors import CheckpointError
from revnet.models.pretrained.hub_files import download, is_hub_name
from revnet.models.pretrained.mixin import HubMixin, describe_model
from revnet.models.pretrained.reading import (
    NETWORK_KEY,
    NETWORK_PREFIX,
    header_of,
    is_pretrained_file,
    read_pretrained,
    weights_in,
)
from revnet.models.pretrained.shipped import closest_names, find_pretrained
from revnet.models.pretrained.tensor_file import read_tensors, write_tensors
from revnet.training.processes.world import current_world
from revnet.training.run import run_dir
from revnet.training.run.file_integrity import check_zip
from revnet.training.run.state_digest import DIGEST_KEY, is_changed
from revnet.training.saved_module import SavedModule, attribute_of_kind

HEADER_KEY = "revnet"
"""Key of the header in a checkpoint."""
EPOCH_KEY = "epoch"
"""Key of the epoch in the metadata of a weights file."""

_PARTS: dict[str, type] = {
    "callbacks": dict,
    "loops": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
}
"""Types of the parts of a checkpoint that Lightning writes."""
# The unpickler runs on whatever bytes a file has.
_READ_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)
_WAY_OUT = (
    "pass a `.safetensors` or `.ckpt` file, or the folder of a run of `revnet train`, the name of a "
    "network in `revnet.models.list_pretrained()`, or hub:owner/name"
)
_Module = TypeVar("_Module", bound=SavedModule)


class SavedWeights(NamedTuple):
    """Contents of a weights file."""

    metadata: Mapping[str, str]
    """The header."""
    tensors: dict[str, Tensor]
    """Tensors by their names in the module that was trained."""


def save_weights(module: SavedModule, path: Path, *, epoch: int | None = None) -> None:
    """Write the tensors and the header of `module`; of several processes, which must all call this, one writes.

    Args:
        module: The module.
        path: File to write.
        epoch: Number of the epoch that the tensors are from, counted from 1; None if they are from no epoch.
    """
    # Not at the top of this file, because this import takes as long as loading a small network.
    from revnet.training.run.divided_state import whole_state

    tensors = {name: tensor.contiguous().cpu() for name, tensor in whole_state(module).items()}
    if not current_world().is_main:
        return
    metadata = module.header.to_metadata() | ({} if epoch is None else {EPOCH_KEY: str(epoch)})
    write_tensors(path, tensors, metadata | _describe_network(module.model))


def _describe_network(network: nn.Module) -> dict[str, str]:
    """Return the description that `from_pretrained` reads, if `network` is one of this library."""
    if not isinstance(network, HubMixin):
        return {}
    try:
        return {NETWORK_KEY: json.dumps(describe_model(network))}
    except ValueError:  # a callback has set a coupling of its own
        return {}


def load_module(module_type: type[_Module], path: str | Path) -> _Module:
    """Rebuild a module from a file of weights, on the CPU and in evaluation mode.

    Args:
        module_type: Class of the module.
        path: A `.safetensors` file, a `.ckpt` file or folder, or the folder of a run.

    Raises:
        CheckpointError: The file does not exist, is truncated, was not written by revnet, holds another kind of module,
            or its tensors do not fit the model that it names.
    """
    check_path("path", path, hint="a file of weights, or the folder of a run")
    path = find_weights(Path(path))
    metadata, tensors = read_weights(path)
    header = module_type.header_type.from_metadata(metadata, path)
    return module_type.from_tensors(header, tensors, path).eval()


def find_weights(path: Path) -> Path:
    """Return the file of weights: `path` itself or, in the folder of a run, the last weights.

    A name such as `hub:owner/name` is downloaded from the Hugging Face hub, and a name such as `revnet38.digits` stands
    for weights that come with the package.

    This is the rule of `evaluate`, `predict`, `sample`, `generate` and of runs that start from trained weights, and the
    first score in the report of a run belongs to the last weights, too. To use the best on validation, pass the path of
    `best.safetensors`.

    Raises:
        CheckpointError: The file does not exist, or the hub cannot be reached.
    """
    if is_hub_name(path):
        path = download(str(path))
    path = find_pretrained(path) or path
    if not path.is_dir() or run_dir.is_sharded(path):
        return _existing(path)
    weights = weights_in(path)
    if weights is not None:
        return weights
    checkpoints = sorted((path / run_dir.CHECKPOINTS).glob("*.ckpt"), key=lambda file: (len(file.name), file.name))
    if checkpoints:  # of a run that was stopped in its first epoch
        return checkpoints[-1]
    raise CheckpointError(f"`{path}` holds no {run_dir.LAST_WEIGHTS} and no checkpoint; {_WAY_OUT}.")


def read_weights(path: Path) -> SavedWeights:
    """Read a `.safetensors` file, or the same part of a checkpoint.

    Raises:
        CheckpointError: The file is missing, truncated, or was not written by `revnet train`.
    """
    if path.suffix == ".ckpt":
        return trained_part(read_checkpoint(path))
    if is_pretrained_file(path):
        return _read_pretrained_run(path)
    return SavedWeights(*read_tensors(path, way_out=_WAY_OUT))


def _read_pretrained_run(path: Path) -> SavedWeights:
    """Read what `save_pretrained` has written, with the names that the tensors had in the run."""
    pretrained = read_pretrained(path)
    header = header_of(pretrained)
    if header is None:
        raise CheckpointError(
            f"`{path}` is a network without the labels and the preprocessing of a run; load it with "
            "`revnet.models.from_pretrained`, or push a run with `revnet push`."
        )
    network = {f"{NETWORK_PREFIX}{name}": tensor for name, tensor in pretrained.tensors.items()}
    return SavedWeights(header, network | pretrained.others)


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint to resume from, without executing anything in it.

    Raises:
        CheckpointError: The checkpoint is missing, truncated, or was not written by `revnet train`.
    """
    path = _existing(Path(path))
    if run_dir.is_sharded(path):
        # Not at the top of this file, for the same reason as `divided_state`.
        from revnet.training.run.shards import read_shards

        return _load(path, lambda: read_shards(path))
    return _load(path, lambda: _read_file(path, map_location))


def read_outline(path: Path) -> dict[str, Any]:
    """Read a checkpoint with tensors that have shapes, and no values in memory.

    Raises:
        CheckpointError: The checkpoint is truncated, or not a checkpoint.
    """
    if run_dir.is_sharded(path):
        from revnet.training.run.shards import outline_shards

        return _load(path, lambda: outline_shards(path))
    return _load(path, lambda: _map_file(path))


def _load(path: Path, load: Callable[[], Any]) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            checkpoint = load()
    except PermissionError:
        raise
    except _READ_ERRORS as error:
        raise CheckpointError(f"`{path}` is truncated or not a PyTorch checkpoint; {_WAY_OUT}.") from error
    if not _is_ours(checkpoint):
        raise CheckpointError(f"`{path}` was not written by `revnet train`; {_WAY_OUT}.")
    if is_changed(checkpoint):
        raise CheckpointError(f"`{path}` is damaged: it holds other values than `revnet train` wrote; copy it again.")
    return cast("dict[str, Any]", checkpoint)


def check_whole_state(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Raise unless the state of a checkpoint is known to be the one that was saved, so that a run can continue from it.

    Raises:
        CheckpointError: The checkpoint has no digest.
    """
    if DIGEST_KEY not in checkpoint and not run_dir.is_sharded(path):
        raise CheckpointError(
            f"`{path}` has no digest, so another program or version wrote it; its weights can be used, but no run can "
            "continue from it; restore the file, or pass it as `weights` of a new run."
        )


def _is_ours(checkpoint: Any) -> bool:
    if not isinstance(checkpoint, dict):
        return False
    header, state = checkpoint.get(HEADER_KEY), checkpoint.get("state_dict")
    if any(not isinstance(checkpoint.get(name, kind()), kind) for name, kind in _PARTS.items()):
        return False
    return (
        isinstance(header, dict)
        and all(isinstance(text, str) for item in header.items() for text in item)
        and isinstance(state, dict)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items())
    )


def _read_file(path: Path, map_location: Any) -> Any:
    check_zip(path)
    with path.open("rb") as file:
        return torch.load(file, map_location=map_location, weights_only=True)


def _map_file(path: Path) -> Any:
    check_zip(path)
    with name_in_utf8(path) as name:
        return torch.load(name, "cpu", weights_only=True, mmap=True)


def trained_part(checkpoint: Mapping[str, Any]) -> SavedWeights:
    """Return the part of a checkpoint that the file of weights holds."""
    metadata = checkpoint[HEADER_KEY]
    prefix = f"{attribute_of_kind(metadata)}."
    state = checkpoint["state_dict"].items()
    return SavedWeights(metadata, {name.removeprefix(prefix): x for name, x in state if name.startswith(prefix)})


def _existing(path: Path) -> Path:
    if (fault := explain_link(path)) is not None:
        raise CheckpointError(f"`{path}` {fault}.")
    if not path.is_file() and not run_dir.is_sharded(path):
        if not path.exists() and (close := closest_names(str(path))):
            raise CheckpointError(f"`{path}` does not exist; did you mean '{close[0]}'?")
        fault = "is not a file" if path.exists() else "does not exist"
        raise CheckpointError(f"`{path}` {fault}; {_WAY_OUT}.")
    return path
