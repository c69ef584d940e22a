"""Checks of a checkpoint in shards before PyTorch reads it: its files, their checksums, and what its list asks for."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from revnet._input_files import open_regular
from revnet.training.run.file_integrity import check_members

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = frozenset(
    {
        f"{_METADATA}.{name}"
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    }
    | {"torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout", "torch.Size"}
    | {f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("Path", "PosixPath", "WindowsPath")}
    | {"collections.OrderedDict"}
)
"""What a list of shards consists of, besides data types and layouts."""


def check_shards(folder: Path, metadata: Metadata) -> None:
    """Check the files of shards that `metadata` lists: their sizes, their checksums, and that they hold only data.

    Raises:
        OSError: A file cannot be read, or is not a regular file.
        ValueError: A byte has changed, or a file is truncated or outside `folder`.
        pickle.UnpicklingError: An entry asks for a function.
        zipfile.BadZipFile: An entry is in another format.
    """
    for index, place in metadata.storage_data.items():
        if Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"a shard is at `{place.relative_path}`, outside the folder")
        path = folder / place.relative_path
        with open_regular(path) as file:
            file.seek(place.offset)
            content = file.read(place.length)
        if len(content) < place.length:
            raise ValueError(f"`{path}` is truncated")
        check_members(io.BytesIO(content), place.length)
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def read_shard_metadata(path: Path) -> Metadata:
    """Read the list of shards without running anything that the pickle asks for, unlike PyTorch's own reader.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
        pickle.UnpicklingError: The pickle asks for anything but the classes of the list.
        ValueError: The file holds another object.
    """
    with open_regular(path) as file:
        metadata = _Unpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise ValueError(f"`{path}` does not list shards.")
    return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        if not is_type and f"{module}.{name}" not in _ALLOWED:
            raise pickle.UnpicklingError(f"the list of shards asks for {module}.{name}")
        return super().find_class(module, name)
