"""Names of the hardware that a measurement ran on."""

import os
import platform
import re
from pathlib import Path

import torch

_CPU = torch.device("cpu")


def hardware_name(device: torch.device = _CPU) -> str:
    """Return a name of the hardware for file names, such as "cpu2" (two cores) or "nvidia-h200"."""
    if device.type in ("cpu", "meta"):
        return f"cpu{os.cpu_count()}"
    return re.sub(r"[^a-z0-9]+", "-", accelerator_name(device).lower()).strip("-")


def accelerator_name(device: torch.device) -> str:
    """Return the name of an accelerator, such as "NVIDIA H200", or its type if PyTorch does not know the name."""
    get_name = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if get_name is None else str(get_name(device))


def processor_name() -> str:
    """Return the model name of the processor, or its architecture if the system does not know the name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
