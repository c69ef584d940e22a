"""The outline of a module that a file describes: built without memory, and no larger than the file."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_Module = TypeVar("_Module", bound=nn.Module)

_TENSORS_PER_TENSOR = 8
_FREE_TENSORS = 500
"""Tensors that a constructor may create for its own use, for each tensor of the file and in all."""
_ELEMENTS_PER_ELEMENT = 4
_FREE_ELEMENTS = 2**24
_DRAWS = (nn.init.normal_, Tensor.normal_)
"""Functions that draw the values of a tensor. An outline has no values, and PyTorch would import its compiler first."""


def build_outline(build: Callable[[], _Module], tensors: Mapping[str, Tensor]) -> _Module:
    """Call `build` with tensors that have shapes, and no values in memory.

    Args:
        build: Function that builds a module from the description in a file, which may come from a stranger.
        tensors: Tensors of the file. The module is given up as soon as it has far more or far larger ones.

    Raises:
        ValueError: The module is far larger than the file.
    """
    with torch.device("meta"), _Limit(tensors.values()):
        return build()


class _Limit(TorchFunctionMode):
    """Count the tensors that are created, raise once they exceed the ones of the file, and draw no values."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        sizes = [tensor.numel() for tensor in tensors]
        self._num_left = _TENSORS_PER_TENSOR * len(sizes) + _FREE_TENSORS
        self._elements_left = _ELEMENTS_PER_ELEMENT * sum(sizes) + _FREE_ELEMENTS

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        if any(isinstance(argument, Tensor) for argument in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        try:
            created = function(*args, **kwargs)
        except RuntimeError as error:  # a size that overflows an integer
            raise ValueError(f"it has a tensor that no machine can hold ({_first_line(error)}).") from error
        if isinstance(created, Tensor):
            self._num_left -= 1
            self._elements_left -= created.numel()
            if self._num_left < 0 or self._elements_left < 0:
                raise ValueError("its header describes a model that is far larger than the tensors in the file.")
        return created


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
