"""Where a classifier runs, as a user says it."""

from __future__ import annotations

import torch

_WAY_OUT = "pass auto, cpu, cuda, cuda:1, or mps."


def find_device(name: str) -> torch.device:
    """Turn `auto` into the GPU if there is one, and any other name into the device that it names.

    Raises:
        ValueError: There is no such device here.
    """
    num_gpus = torch.cuda.device_count()
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if num_gpus else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` (={name!r}) is no device; {_WAY_OUT}") from error
    available = {"cpu": 1, "cuda": num_gpus, "mps": int(has_mps)}
    if device.type not in available:
        raise ValueError(f"`device` (={name!r}) is of a kind that revnet does not use; {_WAY_OUT}")
    if (device.index or 0) >= available[device.type]:
        raise ValueError(f"`device` (={name!r}) is not available to this PyTorch; {_WAY_OUT}")
    return device
