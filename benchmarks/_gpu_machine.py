"""The head of the page of `gpu.py`. It runs in a separate process, since querying a GPU takes memory on it."""

from collections.abc import Iterator, Sequence

import torch
from _gpu_part import Part, Setting
from _gpu_step import low_precision
from _memory_page import MIB, Row

from revnet._hardware import hardware_name
from revnet._provenance import describe_machine


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the name of the hardware for file names, and the lines of the page."""
    lines = describe_machine("{command}", device=setting.device)
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        lines.append(
            f"- GPU: {properties.total_memory / MIB:,.0f} MiB, capability {properties.major}.{properties.minor}, "
            f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}; TF32 in convolutions: "
            f"{torch.backends.cudnn.allow_tf32}, in matrix products: {torch.backends.cuda.matmul.allow_tf32}; 16 bits: "
            f"{low_precision(setting.device)}"
        )
    yield {"hardware": hardware_name(setting.device), "lines": lines}


def lines(rows_of_part: Sequence[Row]) -> list[str]:
    """Return the lines of the page."""
    return list(rows_of_part[0]["lines"])


MACHINE = Part("machine", "Machine", 60, rows, lines)
