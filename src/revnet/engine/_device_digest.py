"""Digests of tensors that are not in host memory. Reading a digest waits for the device.

On a GPU, a chain therefore compares only its first run and every 63rd run after it. A function that reads random
numbers from outside of PyTorch, or keeps state in attributes, is wrong in every run. In the runs between, a sample
shows drift, and nothing waits.
"""

from typing import Any

import torch
from torch import Tensor

from revnet._torch_internals import in_functorch_transform
from revnet.engine._arrays import DTYPES, SIZE, step_of

WAITING_INTERVAL = 63  # Odd, so that it meets each run of a chain that runs twice in a step.
"""Number of runs of a chain on a GPU from one that waits for the device to the next."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_on_accelerator(x: Tensor) -> bool:
    """Return whether the values of a tensor are in the memory of an accelerator."""
    return type(x) is Tensor and x.device.type not in ("cpu", "meta") and x.layout is torch.strided


def may_wait_for(x: Tensor) -> bool:
    """Return whether the values of a tensor on an accelerator can be read now, and have a dtype that NumPy has too."""
    return x.dtype in DTYPES and may_sample(x)


def may_sample(x: Tensor) -> bool:
    """Return whether some values of a tensor on an accelerator can be read now."""
    if not is_on_accelerator(x):
        return False
    # While a CUDA graph is captured, waiting is an error.
    is_capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (in_functorch_transform() or is_capturing)


def sample_on_device(x: Tensor, size: int = SIZE, *, at_least: bool = False) -> list[float]:
    """Return a sample of a tensor's elements, in the order of a contiguous tensor, as `step_of` takes it."""
    flat = _flat(x)
    # To the host first, because MPS has no float64.
    sample: Any = flat[:: step_of(flat.numel(), size, at_least=at_least)].cpu().double().tolist()
    return list(sample)


def checksum_on_device(x: Tensor) -> int:
    """Return the sum of a tensor's bits, read as integers, modulo 2^64."""
    flat = _flat(x)
    # As integers: the order of the sum does not matter, and NaN hides nothing.
    return int(flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64).item())


def _flat(x: Tensor) -> Tensor:
    x = x.detach()
    # `view_as_real` rejects a lazy conjugate.
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1)
