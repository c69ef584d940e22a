"""Memory that the process has used, and memory that is free, as the operating system or the GPU reports it."""

import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_CPU = torch.device("cpu")


def process_peak_bytes(device: torch.device = _CPU) -> int | None:
    """Return the peak memory of this process since it started.

    On the CPU this is resident memory, and on a GPU what PyTorch's allocator handed out. None if the system does not
    report it.
    """
    max_allocated = _accelerator_function(device, "max_memory_allocated")
    if max_allocated is not None:
        return int(max_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_bytes(device: torch.device = _CPU) -> int | None:
    """Return the free memory of a GPU or of the host, or None if the system does not report it."""
    memory_info = _accelerator_function(device, "mem_get_info")
    if memory_info is not None:
        return int(memory_info(device)[0])
    meminfo = Path("/proc/meminfo")
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    return None if match is None else 1024 * int(match[1])


def _accelerator_function(device: torch.device, name: str) -> Callable[..., Any] | None:
    """Return a function of the module of an accelerator; None for the CPU, and where the module has no such function.

    A Mac's GPU has the memory of the host, so `torch.mps` has none.
    """
    return None if device.type in ("cpu", "meta") else getattr(torch.get_device_module(device), name, None)
