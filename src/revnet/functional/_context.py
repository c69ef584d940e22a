"""The context in which a function runs: autocast, and transforms of functions."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from revnet._torch_internals import forward_mode_level, in_functorch_transform
from revnet._torch_release import is_autocast_on


def is_transformed() -> bool:
    """Return whether a transform of `torch.func` or forward-mode differentiation runs, but no compiler.

    Most functions of our own that differentiate themselves do not work there.
    """
    return not torch.compiler.is_compiling() and (in_functorch_transform() or forward_mode_level() >= 0)


def autocast_now(device_type: str) -> AbstractContextManager[Any]:
    """Return a context that restores the current autocast state."""
    if not is_autocast_on(device_type):
        return nullcontext()
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type), cache_enabled=False)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the data type to which autocast converts `x`, or None if it is off or leaves `x` alone."""
    if x.dtype is not torch.float64 and is_autocast_on(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return None


def check_same_dtype(**tensors: Tensor) -> None:
    """Raise unless all `tensors` have the data type of the first one, or autocast gives them one."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != first.dtype and (autocast_dtype(first) is None or tensor.dtype is torch.float64):
            raise TypeError(
                f"`{name}` has dtype {tensor.dtype}, but `{first_name}` has {first.dtype}; convert one of them, or use "
                "autocast."
            )
