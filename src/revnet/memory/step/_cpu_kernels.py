"""Correct PyTorch's shape functions where the CPU's kernels return something else."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from revnet._torch_internals import active_fake_mode
from revnet.memory.step._iterator_strides import is_iterated, strides_of_result
from revnet.memory.step._shape_cache import ShapeCache

_aten = torch.ops.aten
_LOSSES = {
    *(_aten.mse_loss.default, _aten.smooth_l1_loss.default, _aten.binary_cross_entropy.default),
    _aten.soft_margin_loss.default,
}
_BAGS = {_aten._embedding_bag.default, _aten._embedding_bag_forward_only.default}
_CONTIGUOUS = {_aten.masked_fill.Scalar, _aten.masked_fill.Tensor, _aten.log_sigmoid_forward.default}
_NORMS = {_aten.native_batch_norm.default, _aten.native_layer_norm.default, _aten.native_group_norm.default}

_SHAPES = ShapeCache()


class CpuKernels(TorchDispatchMode):
    """Correct the results of operations on fake CPU tensors, and on meta tensors, which represent them.

    Enter it after the fake mode. On a release that needs fewer corrections, the others change nothing, and
    `tests/memory/step/test_cpu_kernels.py` fails to say which to delete once older releases are dropped.

    * The results of pointwise operations have the strides that the kernels choose.
    * The results of `masked_fill` and `logsigmoid` are contiguous.
    * The statistics of a norm are float32 if its input has a lower precision and any parameter is float32.
    * Batch norm computes no gradient of its input if none is requested.
    * The gradient of group norm has the data type of the input.
    * The gradient of layer norm is contiguous.
    * The mean or the sum of some losses, and the result of `fold`, are in memory that was larger before.
    * The bags of an embedding have one more place in memory.
    * Attention in float64 returns the logarithms of its sums in float64. Only PyTorch 2.11 needs this correction.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mode = active_fake_mode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and correct its result, or return the cached result."""
        kwargs = kwargs or {}
        if self._mode is None:
            return self._run(func, args, kwargs)
        return _SHAPES.run(self._mode, self._run, func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if is_iterated(func):
            if all(map(_is_dense, (result, *args))):
                return _with_strides(result, strides_of_result(func, args, result.shape))
        elif func in _CONTIGUOUS:
            if all(map(_is_dense, args)):
                return tree_map_only(Tensor, _with_strides, result)
        elif func in _NORMS:
            if _is_cpu(args[0]) and _is_mixed(args):
                return result[0], *(torch.empty_like(statistic, dtype=torch.float32) for statistic in result[1:])
        elif func in _LOSSES:
            if result.dim() == 0:
                return _in_memory_of(result, torch.broadcast_shapes(args[0].shape, args[1].shape).numel())
        elif func is _aten.col2im.default:
            return _in_memory_of(result, args[0].numel())
        elif func in _BAGS:
            y, bags, *rest = result
            return y, _in_memory_of(bags, bags.numel() + 1) if bags.numel() else bags, *rest
        elif func is _aten.native_batch_norm_backward.default:
            wants_input = args[9][0]
            if _is_cpu(args[0]) and not wants_input:
                return None, *result[1:]
        elif func is _aten._scaled_dot_product_flash_attention_for_cpu.default:
            y, log_sums = result
            if y.dtype is torch.float64 and log_sums.dtype is not torch.float64:
                return y, torch.empty_like(log_sums, dtype=torch.float64)
        elif func is _aten.native_layer_norm_backward.default:
            grad_input = result[0]
            if grad_input is not None and _is_cpu(grad_input) and not grad_input.is_contiguous():
                return torch.empty_like(grad_input, memory_format=torch.contiguous_format), *result[1:]
        elif func is _aten.native_group_norm_backward.default:
            x = args[1]
            if _is_cpu(x) and result[0] is not None and result[0].dtype != x.dtype:
                return torch.empty_like(result[0], dtype=x.dtype), *result[1:]
        return result


def _with_strides(result: Tensor, strides: tuple[int, ...] | None = None) -> Tensor:
    """Return the result with these strides; None for contiguous ones."""
    if strides is None:
        strides = torch.empty(result.shape, device="meta").stride()
    return result if result.stride() == strides else result.new_empty_strided(result.shape, strides)


def _in_memory_of(result: Tensor, numel: int) -> Tensor:
    """Return the result in the memory of `numel` elements, if it needs less."""
    if result.numel() >= numel:
        return result
    return result.new_empty(numel).as_strided(result.shape, result.stride())


def _is_cpu(tensor: Tensor) -> bool:
    return tensor.device.type in ("cpu", "meta")


def _is_dense(value: Any) -> bool:
    """Return whether a value is a number or a dense tensor on the CPU."""
    return not isinstance(value, Tensor) or (_is_cpu(value) and value.layout is torch.strided)


def _is_mixed(args: Any) -> bool:
    is_low = args[0].dtype in (torch.bfloat16, torch.float16)
    return is_low and any(isinstance(arg, Tensor) and arg.dtype is torch.float32 for arg in args[1:])
