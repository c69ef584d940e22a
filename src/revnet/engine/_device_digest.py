"""Digests of tensors that are not in the memory of the host. Reading one waits for its device.

A run on a GPU is therefore not compared each time, but in its first run and in each 64th: what a function gets from
outside of PyTorch, or keeps in attributes, is wrong in every run. In between a sample shows drift, and nothing waits.
"""

from typing import Any

import torch
from torch import Tensor

from revnet._torch_internals import in_functorch_transform
from revnet.engine._arrays import DTYPES, SIZE, step_of

WAITING_INTERVAL = 64
"""Runs of a chain on a GPU between two that wait for it."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def may_wait_for(x: Tensor) -> bool:
    """Return whether the values of a tensor of another device than the CPU can be read at this moment."""
    if type(x) is not Tensor or x.device.type in ("cpu", "meta") or x.layout is not torch.strided:
        return False
    # While a CUDA graph is captured, waiting is an error.
    is_capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return x.dtype in DTYPES and not (in_functorch_transform() or is_capturing)


def sample_on_device(x: Tensor, most: int = SIZE) -> list[float]:
    """Return about `most` elements of a tensor, in the order in which a contiguous one would hold them."""
    flat = _flat(x)
    # To the host first: MPS has no float64.
    sample: Any = flat[:: step_of(flat.numel(), most)].cpu().double().tolist()
    return list(sample)


def checksum_on_device(x: Tensor) -> int:
    """Return the sum of the bits of a tensor, read as integers, modulo 2^64."""
    flat = _flat(x)
    # As integers: their sum is the same in any order of adding, and NaN hides nothing.
    return int(flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64).item())


def _flat(x: Tensor) -> Tensor:
    x = x.detach()
    # `view_as_real` refuses a lazy conjugate.
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1)
