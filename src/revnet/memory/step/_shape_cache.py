"""Remember the shapes that operations on fake tensors return.

A step of a deep network runs the same operations on the same shapes many times, and a plan runs many steps. PyTorch has
a cache of its own, but computing its general key takes longer than everything else that a prediction does for an
operation. This cache serves plain operations on plain tensors, and leaves the others to PyTorch.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch._ops import OpOverload

from revnet._torch_internals import FakeTensor, FakeTensorMode, tree_leaves, without_dispatch

_aten = torch.ops.aten
_MOST_ENTRIES = 100_000
_NO_PLACE = -1
"""Position of a tensor inside a list."""
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool}
_DTYPES |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_CONSTANTS = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
"""Types of arguments that are a part of the key."""
_UNUSUAL_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
# Their results carry a value.
_LIFTS = {_aten.lift.default, _aten.lift_fresh.default, _aten.lift_fresh_copy.default}

_Recipe = Callable[[FakeTensorMode, Sequence[Any]], Any]
"""Function from a fake mode and the positional arguments of a call to its result."""


class _NotPlainError(Exception):
    """A key cannot describe an argument, or a recipe a result."""


class ShapeCache:
    """The results of operations on fake tensors, by the operation and its arguments."""

    def __init__(self) -> None:
        self._recipes: dict[Hashable, _Recipe | None] = {}

    def run(self, mode: FakeTensorMode, call: Callable[..., Any], func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Return the result of an operation: new tensors, the tensors that it wrote to, or views of its arguments.

        Args:
            mode: The active fake mode.
            call: Function that runs the operation, called with the remaining arguments.
            func: The operation.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        key = _key_of(mode, func, args, kwargs)
        if key is None:
            return call(func, args, kwargs)
        if key in self._recipes:
            recipe = self._recipes[key]
            return call(func, args, kwargs) if recipe is None else recipe(mode, args)
        result = call(func, args, kwargs)
        if len(self._recipes) >= _MOST_ENTRIES:
            self._recipes.clear()
        # The effect of an operation that changes the shape of an argument cannot be cached.
        is_kept = _key_of(mode, func, args, kwargs) == key
        self._recipes[key] = _recipe_of(args, kwargs, result) if is_kept else None
        return result


def _key_of(mode: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
    """Return what determines the result of an operation; None if that is not known."""
    if not _is_plain(func) or mode.shape_env is not None or torch.is_inference_mode_enabled():
        return None
    try:
        parts: list[Any] = [func, torch.get_default_dtype()]
        _describe(args, mode, parts)
        for name, value in kwargs.items():
            parts.append(name)
            _describe((value,), mode, parts)
        return tuple(parts)
    except _NotPlainError:
        return None


def _describe(values: Sequence[Any], mode: FakeTensorMode, parts: list[Any]) -> None:
    """Add to `parts` what identifies the values, each with its type, because `1 == 1.0 == True`."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            dtype = value.dtype
            is_usual = dtype in _DTYPES and value.constant is None and value.layout is torch.strided
            if not is_usual or value.fake_mode is not mode:
                raise _NotPlainError
            parts += (value.shape, value.stride(), dtype, value.storage_offset(), value.fake_device)
        elif kind in _CONSTANTS:
            parts += (kind, value)
        elif kind is tuple or kind is list:
            parts += (kind, len(value))
            _describe(value, mode, parts)
        else:
            raise _NotPlainError


@lru_cache(maxsize=4096)
def _is_plain(func: Any) -> bool:
    """Return whether the shapes that an operation returns follow from the shapes that it is given."""
    return (
        isinstance(func, OpOverload)
        and func.namespace == "aten"
        and func not in _LIFTS
        and _UNUSUAL_TAGS.isdisjoint(func.tags)
        and not any(argument.is_out for argument in func._schema.arguments)
    )


def _recipe_of(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Recipe | None:
    """Return how to make the result of a call again; None if it cannot be made."""
    sources: dict[int, int] = {}
    for index, value in enumerate(args):
        if type(value) is FakeTensor:
            sources.setdefault(value.untyped_storage()._cdata, index)
    for value in tree_leaves((args, kwargs)):
        if type(value) is FakeTensor:
            sources.setdefault(value.untyped_storage()._cdata, _NO_PLACE)
    try:
        return _remake(args, sources, result)
    except _NotPlainError:
        return None


def _remake(args: tuple[Any, ...], sources: dict[int, int], result: Any) -> _Recipe:
    """Return how to make a result again.

    Args:
        args: The positional arguments of the call.
        sources: Positions of the arguments by the memory that they use.
        result: What the call returned, or a part of it.
    """
    if result is None:
        return _none
    if type(result) in (tuple, list):
        recipes = [_remake(args, sources, value) for value in result]
        kind = type(result)
        return lambda mode, args: kind([recipe(mode, args) for recipe in recipes])
    if type(result) is not FakeTensor or result.dtype not in _DTYPES or result.constant is not None:
        raise _NotPlainError
    if result.layout is not torch.strided:  # It has no storage.
        raise _NotPlainError
    shape, stride, dtype, device = tuple(result.shape), result.stride(), result.dtype, result.fake_device
    offset, storage = int(result.storage_offset()), result.untyped_storage()
    source = sources.get(storage._cdata)
    if source is not None:
        if source == _NO_PLACE:
            raise _NotPlainError
        if result is args[source]:
            return lambda mode, args: args[source]
        return lambda mode, args: _view(mode, args[source], shape, stride, dtype, offset, device)
    sources[storage._cdata] = _NO_PLACE  # Two results that share their memory are not plain.
    if offset or storage.nbytes() != _new(shape, stride, dtype).untyped_storage().nbytes():
        raise _NotPlainError
    return lambda mode, args: FakeTensor(mode, _new(shape, stride, dtype), device)


def _none(mode: FakeTensorMode, args: Sequence[Any]) -> None:
    return None


def _new(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    with without_dispatch():
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _view(
    mode: FakeTensorMode,
    base: torch.Tensor,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    offset: int,
    device: torch.device,
) -> FakeTensor:
    with without_dispatch():
        meta = torch.empty((0,), dtype=dtype, device="meta")
        meta.set_(base.untyped_storage(), offset, shape, stride)
    return FakeTensor(mode, meta, device)
