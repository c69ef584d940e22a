"""Decide which blocks of a sequence are equal."""

import dataclasses
import types
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from revnet._torch_internals import hooks_of
from revnet.nn import ReversibleSequential
from revnet.nn.attention import CrossAttention, FullAttention
from revnet.nn.blocks._schedule import ModuleCache

_OF_EVERY_MODULE = set(nn.Module().__dict__) - {"training"}
_ANY_VALUE: dict[str, type | tuple[type, ...]] = {
    "p": nn.modules.dropout._DropoutNd,
    "layer_index": (FullAttention, CrossAttention),
}
"""Attributes whose values do not matter, and their classes: the rate of dropout, and the place in a cache, which no
training step uses."""
_PLAIN = (bool, int, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format, torch.Size)
_DEEPEST = 4
"""Levels of attributes of attributes that are compared."""


def kinds_of_blocks(model: nn.Module, sequence: ReversibleSequential) -> list[int]:
    """Return a number for each block of a sequence in a model, which is the same for equal blocks.

    Blocks are equal if their modules have the same classes and attributes, and their tensors the same shapes. The rates
    of dropout and the places in a cache may differ. A block with hooks, or one that shares a tensor with another
    module, is not equal to any.
    """
    num_uses = Counter(key for module in model.modules() for tensor in own_tensors(module) for key in _keys_of(tensor))
    known: list[Any] = []
    kinds = []
    for block in sequence:
        has_hooks = any(map(any, map(hooks_of, block.modules())))
        is_alone = not _shares_tensors(block, num_uses) and not has_hooks
        structure = _structure_of(block) if is_alone else None
        # Usually it is like the one before.
        kind = next((index for index in range(len(known) - 1, -1, -1) if structure and known[index] == structure), -1)
        if kind < 0:
            kind = len(known)
            known.append(structure)
        kinds.append(kind)
    return kinds


def own_tensors(module: nn.Module) -> Iterable[Tensor]:
    """Return the parameters and buffers of a module, without those of its children."""
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in tensors if tensor is not None]


def _keys_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return keys of which equal ones show that two tensors are one, or share their data."""
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    return id(tensor), (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape)


def _shares_tensors(block: nn.Module, num_uses: Counter[Any]) -> bool:
    return any(
        num_uses[key] > 1 for module in block.modules() for tensor in own_tensors(module) for key in _keys_of(tensor)
    )


def _structure_of(block: nn.Module) -> tuple[Any, ...]:
    """Return a value that is equal for two blocks that run the same operations on the same shapes."""
    return tuple(
        (
            name,
            type(module),
            [
                (key, _simplified(value))
                for key, value in module.__dict__.items()
                if key not in _OF_EVERY_MODULE and not isinstance(module, _ANY_VALUE.get(key, ()))
            ],
            [(key, _simplified(value)) for key, value in (*module._parameters.items(), *module._buffers.items())],
            _rate_of(module),
        )
        for name, module in block.named_modules()
    )


def _rate_of(module: nn.Module) -> str:
    """Return whether the module is a dropout that drops nothing, something or everything, which needs no mask."""
    if not isinstance(module, nn.modules.dropout._DropoutNd) or module.p == 0:
        return "nothing"
    return "everything" if module.p == 1 else "something"


def _simplified(value: Any, depth: int = 0) -> Any:
    """Return a value that can be compared, and that is equal only for values of the same effect on bytes."""
    if isinstance(value, ModuleCache):
        return ModuleCache
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.stride(), value.requires_grad, type(value)
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    if type(value) in (list, tuple, set, frozenset):
        items = [_simplified(item, depth + 1) for item in value]
        return type(value), items
    if type(value) is dict:
        return [(key, _simplified(item, depth + 1)) for key, item in value.items()]
    if isinstance(value, (*_PLAIN, float, complex, type, types.FunctionType, types.BuiltinFunctionType)):
        return type(value), value
    if dataclasses.is_dataclass(value) and type(value).__eq__ is not object.__eq__:
        return value
    if depth < _DEEPEST and not isinstance(value, nn.Module) and hasattr(value, "__dict__") and _is_plain(value):
        return type(value), _simplified(vars(value), depth + 1)
    return id(value)


def _is_plain(value: Any) -> bool:
    """Return whether the attributes of an object are all that it consists of."""
    return "__reduce_ex__" not in _defined_in(type(value)) and not callable(value)


def _defined_in(kind: type) -> set[str]:
    """Return the names that a class and its bases define, without `object`."""
    return {name for base in kind.__mro__ if base is not object for name in vars(base)}
