"""Files of tensors in the safetensors format, and their comparison with a model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from revnet._atomic_file import atomic_path
from revnet._input_files import name_in_utf8
from revnet._outside_text import shorten
from revnet.errors import CheckpointError, MissingDependencyError
from revnet.models.pretrained.shipped import packaged_name
from revnet.models.pretrained.weights_hash import HASH_KEY, hash_weights, is_damaged

_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
_PURPOSE = "a file of weights"
_REINSTALL = "it belongs to the package, so reinstall revnet, as with `pip install --force-reinstall --no-deps`"


def read_tensors(path: Path, *, way_out: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a file.

    Args:
        path: The file.
        way_out: What to pass instead, for the error message.

    Raises:
        CheckpointError: The file is truncated, damaged, or not a safetensors file.
        MissingDependencyError: safetensors is not installed.
        OSError: The file cannot be opened, or is not a regular file.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of("safetensors", _PURPOSE) from error
    try:
        with name_in_utf8(path) as name, safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        way_out = _REINSTALL if packaged_name(path) else way_out
        raise CheckpointError(f"`{path}` is truncated or not a safetensors file; {way_out}.") from error
    if is_damaged(metadata, tensors):
        way_out = _REINSTALL if packaged_name(path) else "copy it again"
        raise CheckpointError(f"`{path}` is damaged: its content has changed since revnet wrote it; {way_out}.")
    return metadata, tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file whole or not at all, with a hash of its content.

    Args:
        path: File to write.
        tensors: Tensors by name; ones that share memory are written separately.
        metadata: Texts for the header of the file.

    Raises:
        CheckpointError: A tensor is divided among processes, or has no values.
        MissingDependencyError: safetensors is not installed.
        OSError: The file cannot be written.
    """
    try:
        from safetensors.torch import save
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of("safetensors", _PURPOSE) from error
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # A DTensor, whose class would take half a second to import.
        is_divided = hasattr(tensor, "device_mesh")
        if is_divided or tensor.is_meta:
            fault = "is on the meta device" if tensor.is_meta else "is divided among processes"
            raise CheckpointError(
                f"`{name}` {fault}, so it has no values to write; load the weights, or gather them with "
                "`torch.distributed.checkpoint.state_dict.get_model_state_dict`, into a model on the CPU first."
            )
        whole[name] = tensor.detach().cpu().contiguous()
    seen: set[int] = set()
    for name, tensor in whole.items():
        if tensor.untyped_storage().data_ptr() in seen:
            whole[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    with atomic_path(path) as temporary:
        # `save_file` would make a file that only its owner may read.
        content = save(whole, metadata={**metadata, HASH_KEY: hash_weights(metadata, whole)})
        temporary.write_bytes(content)


def first_difference(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], *, lacks: str) -> str | None:
    """Describe the first tensor of a file that differs from the model's in name, shape or type; None if none does.

    Numbers in 16 bits fit a model in 32 bits: a run in bfloat16 saves them.

    Args:
        expected: Tensors of the model.
        actual: Tensors of the file.
        lacks: Subject and verb for a tensor that the file does not have, such as "it lacks".
    """
    in_model = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    in_file = {name: tuple(tensor.shape) for name, tensor in actual.items()}
    for name in sorted(in_model | in_file):
        if name not in in_file:
            return f"{lacks} the tensor `{shorten(name, 100)}`"
        if name not in in_model:
            return f"the model has no tensor `{shorten(name, 100)}`"
        if in_file[name] != in_model[name]:
            return f"`{name}` is {in_file[name]} in the file and {in_model[name]} in the model"
        types = actual[name].dtype, expected[name].dtype
        if types[0] != types[1] and not _FLOATS.issuperset(types):
            return f"`{name}` is {types[0]} in the file and {types[1]} in the model"
    return None
