"""The device of a run or of a command, from its name."""

import torch

_WAY_OUT = "pass auto, cpu, cuda, cuda:1, or mps."


def find_device(name: str) -> torch.device:
    """Return the device of that name, or for `auto` the GPU if there is one.

    Raises:
        ValueError: The device is unknown, or not available here.
    """
    if name.isdecimal():
        raise ValueError(f"`device` (={name!r}) is the kind of device; the number of devices is `devices` (={name}).")
    num_gpus = torch.cuda.device_count()
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if num_gpus else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` (={name!r}) is not a device; {_WAY_OUT}") from error
    available = {"cpu": 1, "cuda": num_gpus, "mps": int(has_mps)}
    if device.type not in available:
        raise ValueError(f"`device` (={name!r}) is of a type that revnet does not use; {_WAY_OUT}")
    if (device.index or 0) >= available[device.type]:
        usable = ["cpu", *(f"cuda:{index}" for index in range(num_gpus)), *(["mps"] if has_mps else [])]
        raise ValueError(f"`device` (={name!r}) is not available to this PyTorch; pass auto or {' or '.join(usable)}.")
    return device
