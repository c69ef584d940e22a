"""The strides of what pointwise operations return.

Where several strides describe the same memory, as on maps of 1 x 1, PyTorch's shape functions choose others than its
kernels. A later operation then runs another kernel, which may allocate other memory.

References:
    PyTorch, aten/src/ATen/TensorIterator.cpp: `compute_fast_setup_type`, `compute_strides`, `reorder_dimensions` and
        `allocate_or_resize_outputs`.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_aten = torch.ops.aten
# Their kernels do not let the iterator allocate the result.
_OTHERS = {
    *(_aten.clone.default, _aten.nan_to_num.default, _aten.hardtanh.default, _aten.relu6.default),
    *(_aten.deg2rad.default, _aten.rad2deg.default, _aten.pow.Scalar, _aten.mvlgamma.default),
    *(_aten.masked_fill.Scalar, _aten.positive.default, _aten.conj_physical.default, _aten.frexp.Tensor),
}
_UNTAGGED = {
    *(_aten.hardswish.default, _aten.hardswish_backward.default, _aten.hardtanh_backward.default),
    *(_aten.elu_backward.default, _aten.leaky_relu_backward.default, _aten.softplus_backward.default),
    *(_aten.mish_backward.default, _aten.hardsigmoid_backward.default),
}
"""Operations that are pointwise, although PyTorch does not say so."""
# Other overloads "Scalar" turn their number into a tensor of no dimensions.
_WITH_PARAMETERS = {_aten.pow.Tensor_Scalar, _aten.lerp.Scalar}
_REVERSED = {_aten.threshold_backward.default, _aten.leaky_relu_backward.default}
"""Operations whose kernels take their operands in the opposite order."""


@lru_cache(maxsize=4096)
def is_iterated(func: Any) -> bool:
    """Return whether `strides_of_result` holds for the result of an operation."""
    if not isinstance(func, OpOverload) or func.namespace != "aten" or func._schema.is_mutable:
        return False
    return func in _UNTAGGED or (torch.Tag.pointwise in func.tags and func not in _OTHERS)


def strides_of_result(func: Any, args: Sequence[Any], shape: torch.Size) -> tuple[int, ...] | None:
    """Return the strides of the result of a pointwise operation; None if they are contiguous.

    Args:
        func: The operation, for which `is_iterated` is true.
        args: Its positional arguments.
        shape: Shape of the result.
    """
    operands = [value for value in args if isinstance(value, Tensor)]
    if func in _REVERSED:
        operands.reverse()
    if not _has_number(func, args) and all(operand.shape == shape for operand in operands):
        if all(operand.is_contiguous() for operand in operands):
            return None
        if len(shape) == 4 and all(operand.is_contiguous(memory_format=torch.channels_last) for operand in operands):
            channels, height, width = shape[1:]
            return height * width * channels, 1, width * channels, channels
        strides = operands[0].stride()
        if _is_dense(shape, strides) and all(operand.stride() == strides for operand in operands):
            return strides
    return _sorted_strides(shape, [_expanded_strides(operand, shape) for operand in operands])


def _has_number(func: Any, args: Sequence[Any]) -> bool:
    """Return whether a number is an operand, and not a parameter."""
    if "scalar" in func._overloadname.lower() and func not in _WITH_PARAMETERS:
        return True
    arguments = zip(func._schema.arguments, args, strict=False)
    return any(isinstance(value, int | float | complex) and "Tensor" in str(kind.type) for kind, value in arguments)


def _is_dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Return whether the elements lie next to each other, and none of them in the same place."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _expanded_strides(operand: Tensor, shape: torch.Size) -> list[int]:
    """Return the strides of an operand in the dimensions of the result, which are 0 where it is broadcast."""
    num_missing = len(shape) - operand.dim()
    pairs = zip(operand.shape, operand.stride(), shape[num_missing:], strict=True)
    return [0] * num_missing + [0 if own == 1 != size else stride for own, stride, size in pairs]


def _sorted_strides(shape: torch.Size, operands: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
    """Return strides in whose order the dimensions are sorted by the strides of the operands."""

    def compare(one: int, other: int) -> int:
        for strides in operands:
            if strides[one] == 0 or strides[other] == 0:
                continue
            if strides[one] != strides[other]:
                return strides[one] - strides[other]
            if shape[one] > shape[other]:
                return 1
        return 0

    usual = list(range(len(shape)))[::-1]
    order = usual.copy()
    # An insertion sort that goes on where two dimensions cannot be compared.
    for last in range(1, len(order)):
        place = last
        for before in range(last - 1, -1, -1):
            comparison = compare(order[before], order[place])
            if comparison > 0:
                order[before], order[place] = order[place], order[before]
                place = before
            elif comparison < 0:
                break
    if order == usual:
        return None
    result, stride = [0] * len(shape), 1
    for dim in order:
        result[dim] = stride
        stride *= shape[dim]
    return tuple(result)
