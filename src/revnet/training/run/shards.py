"""Checkpoints in shards, as `torch.distributed.checkpoint` writes them for a sharded model, read by one process."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from revnet.training.run import run_dir
from revnet.training.run.file_integrity import check_zip
from revnet.training.run.shard_list import check_shards, read_shard_metadata

_LIST = ".metadata"
"""File in which PyTorch lists the shards."""


def read_shards(path: Path) -> dict[str, Any]:
    """Read a checkpoint in shards as if one process had written it.

    Optimizer states are numbered as `torch.optim` numbers them; the shards name them by the parameters.
    """
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    _check(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninitialized")
        checkpoint = _load_distributed_checkpoint(path)
    names = sorted((name for name in checkpoint if name.startswith("optimizer_")), key=len)
    checkpoint["optimizer_states"] = [_numbered(checkpoint.pop(name)) for name in names]
    return checkpoint


def outline_shards(path: Path) -> dict[str, Any]:
    """Read a checkpoint in shards without the values of tensors and without optimizer states.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is damaged.
        pickle.UnpicklingError: A file asks for a function.
        zipfile.BadZipFile: A file is in another format.
    """
    metadata = _check(path)
    checkpoint: dict[str, Any] = torch.load(path / run_dir.SHARDS_EXTRA, map_location="cpu", weights_only=True)
    tensors = metadata.state_dict_metadata.items()
    checkpoint["state_dict"] = {
        name.removeprefix("state_dict."): torch.empty(tensor.size, device="meta")
        for name, tensor in tensors
        if name.startswith("state_dict.") and isinstance(tensor, TensorStorageMetadata)
    }
    return checkpoint


def _check(path: Path) -> Metadata:
    # PyTorch's reader would run what the list of shards asks for.
    check_zip(path / run_dir.SHARDS_EXTRA)
    metadata = read_shard_metadata(path / _LIST)
    check_shards(path, metadata)
    return metadata


def _numbered(optimizer: dict[str, Any]) -> dict[str, Any]:
    groups = optimizer["param_groups"]
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group["params"])}
    return {
        # PyTorch writes no entry for an optimizer without state.
        "state": {numbers[name]: state for name, state in optimizer.get("state", {}).items()},
        "param_groups": [group | {"params": [numbers[name] for name in group["params"]]} for group in groups],
    }
