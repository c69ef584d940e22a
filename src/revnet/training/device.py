"""The device of a run or of a command, from its name."""

import torch

_WAY_OUT = "pass auto, cpu, cuda, cuda:1, xpu, or mps."


def find_device(name: str) -> torch.device:
    """Return the device of that name, or for `auto` the GPU if there is one.

    The devices xpu and mps are untested, and `auto` never takes xpu, on which Lightning cannot train.

    Raises:
        ValueError: The device is unknown, or not available here.
    """
    if name.isdecimal():
        raise ValueError(f"`device` (={name!r}) is the kind of device; the number of devices is `devices` (={name}).")
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        return torch.device(next((kind for kind, count in counts.items() if count), "cpu"))
    counts["xpu"] = torch.xpu.device_count()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` (={name!r}) is not a device; {_WAY_OUT}") from error
    available = {"cpu": 1} | counts
    if device.type not in available:
        raise ValueError(f"`device` (={name!r}) is of a type that revnet does not use; {_WAY_OUT}")
    if (device.index or 0) >= available[device.type]:
        usable = ["cpu", *(f"{kind}:{index}" for kind in ("cuda", "xpu") for index in range(counts[kind]))]
        usable += ["mps"] * counts["mps"]
        raise ValueError(f"`device` (={name!r}) is not available to this PyTorch; pass auto or {' or '.join(usable)}.")
    return device
