"""Read a trained network: from a folder with `config.json`, from a run, from one file, or from the hub."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import revnet
from revnet._checks import describe
from revnet._documents import parse_json
from revnet._input_files import read_text
from revnet._outside_text import shorten
from revnet._paths import expand_user
from revnet.errors import CheckpointError
from revnet.models.pretrained.hub_files import (
    CONFIG,
    MOST_CONFIG_BYTES,
    PREPROCESS,
    PREPROCESS_KEY,
    RUN_WEIGHTS,
    WEIGHTS,
    Download,
    download,
    is_hub_name,
)
from revnet.models.pretrained.shipped import find_pretrained
from revnet.models.pretrained.tensor_file import read_tensors
from revnet.models.pretrained.weights_hash import HASH_KEY

FORMAT = "1"
"""Version of the layout of `config.json`; a revnet refuses the ones that came later."""
NETWORK_KEY = "network"
"""Key of the network's description in the metadata of the weights of a run."""
RUN_KEY = "run"
"""Key in `config.json` of the header of a run: everything that its weights say apart from the network."""
LABELS_KEY = "label_names"
"""Key of the names of the classes, in `config.json`."""
_CLASSES_KEY = "class_names"
"""Key of the names of the classes, in the header of a run."""
NETWORK_PREFIX = "model."
"""Start of the names of the network's tensors in the weights of a run."""
_NOT_IN_RUN = (NETWORK_KEY, HASH_KEY)
_WAY_OUT = "pass the folder of a run, or a folder that `save_pretrained` has written"


@dataclass(frozen=True)
class Pretrained:
    """A trained network as it was read, before it is built."""

    path: Path
    """File of the weights."""
    config: dict[str, Any]
    """Entries of `config.json`."""
    tensors: dict[str, Tensor]
    """Tensors of the network, by their names in it."""
    others: dict[str, Tensor]
    """Other tensors of a run, such as the statistics of the preprocessing."""


def read_pretrained(name: str | Path, options: Download | None = None) -> Pretrained:
    """Read a trained network.

    Args:
        name: A folder, a file of weights, one of `list_pretrained()`, or a name on the hub.
        options: How to download from the hub.

    Raises:
        CheckpointError: The network does not exist, or its files are damaged or have another format.
    """
    path = locate(name, options)
    return _read_folder(path.parent) if is_pretrained_file(path) else _read_run_file(path)


def is_pretrained_file(path: Path) -> bool:
    """Return whether `path` is a file of weights that `config.json` next to it describes."""
    return path.name == WEIGHTS and (path.parent / CONFIG).exists()


def locate(name: str | Path, options: Download | None = None) -> Path:
    """Return the file of weights of a trained network; download it if it is on the hub.

    Raises:
        CheckpointError: It does not exist.
        TypeError: `name` is neither a text nor a path.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"`pretrained_model_name_or_path` (={describe(name)}) must be a path or owner/name.")
    if not os.fspath(name):
        raise CheckpointError("`pretrained_model_name_or_path` (='') must be a path or owner/name.")
    path = find_pretrained(name) or expand_user(name)
    if is_hub_name(name) or not (path.exists() or path.is_symlink()):
        if not is_hub_name(name) and _is_path(str(name)):
            raise CheckpointError(f"`{name}` does not exist; {_WAY_OUT}, or a name on the Hugging Face hub.")
        path = download(str(name), options)
    if not path.is_dir():
        return path
    found = weights_in(path)
    if found is None:
        raise CheckpointError(f"`{name}` holds no {WEIGHTS} with a {CONFIG}, and no {RUN_WEIGHTS}; {_WAY_OUT}.")
    return found


def weights_in(folder: Path) -> Path | None:
    """Return the file of weights in a folder that `save_pretrained` or a run has written, or None."""
    if (folder / CONFIG).exists() and (folder / WEIGHTS).exists():
        return folder / WEIGHTS
    return folder / RUN_WEIGHTS if (folder / RUN_WEIGHTS).exists() else None


def header_of(pretrained: Pretrained) -> dict[str, str] | None:
    """Return the header of the run that a network is from, as texts; None if it is from no run."""
    run = pretrained.config.get(RUN_KEY)
    if not isinstance(run, dict):
        return None
    labels = pretrained.config.get(LABELS_KEY)
    entries = run if labels is None else run | {_CLASSES_KEY: labels}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()}


def run_entries(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the entries of `config.json` for the header of a run.

    The names of the classes become `label_names`, as in timm. A path of the data would be of no use elsewhere, and
    shows names of private folders, so only its last part stays.
    """
    entries = {key: _plain(text) for key, text in metadata.items() if key not in _NOT_IN_RUN}
    data = entries.get("data")
    if isinstance(data, str) and Path(data).is_absolute():
        entries["data"] = Path(data).name
    labels = entries.pop(_CLASSES_KEY, None)
    return {RUN_KEY: entries} | ({} if labels is None else {LABELS_KEY: labels})


def _plain(text: str) -> Any:
    """Return the value that `text` is in JSON, if writing it gives the same text; otherwise the text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if not isinstance(value, str) and json.dumps(value) == text else text


def _read_folder(folder: Path) -> Pretrained:
    config = _read_config(folder / CONFIG)
    _check_format(config, folder / CONFIG)
    _, tensors = _read(folder / WEIGHTS)
    others = _read(folder / PREPROCESS)[1] if PREPROCESS_KEY in config else {}
    return Pretrained(folder / WEIGHTS, config, tensors, others)


def _read_run_file(path: Path) -> Pretrained:
    if path.suffix == ".ckpt":
        raise CheckpointError(
            f"`{path}` is a checkpoint to resume from, not a file of weights; pass the folder of the run, or a "
            ".safetensors file in it."
        )
    metadata, tensors = _read(path)
    if NETWORK_KEY not in metadata:
        own = ":" in metadata.get("model", "")
        reason = (
            "its network is your own code" if own else f"neither `revnet train` nor a {CONFIG} describes its network"
        )
        way_out = "build the network, and load it with `load_classifier(path, model=...)`" if own else _WAY_OUT
        raise CheckpointError(f"`{path}` cannot be rebuilt: {reason}; {way_out}.")
    try:
        network = parse_json(metadata[NETWORK_KEY])
    except ValueError as error:
        raise CheckpointError(f"`{path}` cannot be rebuilt: the description of its network is damaged.") from error
    _check_format(network, path)
    return Pretrained(
        path,
        network | run_entries(metadata),
        {
            name.removeprefix(NETWORK_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(NETWORK_PREFIX)
        },
        {name: tensor for name, tensor in tensors.items() if not name.startswith(NETWORK_PREFIX)},
    )


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        return read_tensors(path, way_out=_WAY_OUT)
    except OSError as error:
        raise CheckpointError(f"`{path}` cannot be read: {error.strerror or error}; {_WAY_OUT}.") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return parse_json(read_text(path, MOST_CONFIG_BYTES))
    except OSError as error:
        raise CheckpointError(f"`{path}` cannot be read: {error.strerror or error}; {_WAY_OUT}.") from error
    except ValueError as error:  # UnicodeDecodeError, too
        raise CheckpointError(
            f"`{path}` is not a JSON object ({shorten(str(error), 200)}); restore the file."
        ) from error


def _check_format(config: Mapping[str, Any], path: Path) -> None:
    version = config.get("revnet_format")
    if version is not None and version != FORMAT:
        raise CheckpointError(
            f"`{path}` has format {shorten(str(version), 20)} of revnet "
            f"{shorten(str(config.get('revnet_version', '?')), 20)}, this is revnet {revnet.__version__} with format "
            f"{FORMAT}; update revnet."
        )


def _is_path(name: str) -> bool:
    """Return whether `name` can only be a path: the hub has names of two parts."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith((".safetensors", ".ckpt", "/"))
