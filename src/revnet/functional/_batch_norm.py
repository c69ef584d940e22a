"""Batch norm in a recomputation: the statistics are known, or cheaper to find than the module finds them.

In training, batch norm spends its time on reductions, not on normalising. A recomputation that has the forward pass's
mean and inverse deviation only normalises, for a quarter of the time or less; one that has not can reduce a contiguous
tensor on the CPU several times faster than PyTorch's kernel does, at the precision of the stream's own rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Statistics(NamedTuple):
    """What one call of a batch norm in training found, (C,) each."""

    mean: Tensor
    inverse_deviation: Tensor


def batch_norms_of(function: nn.Module) -> list[nn.Module]:
    """The batch norms in a residual function whose call may be replaced: PyTorch's own, in training, not compiled."""
    norms: list[nn.Module] = []
    for module in function.modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            return []  # A compiled graph is guarded by the modules that it was made for.
        is_plain = type(module).forward is _BatchNorm.forward and "forward" not in module.__dict__
        if is_plain and module.training:
            norms.append(module)
    return norms


@contextmanager
def replaced(norms: list[nn.Module], run: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    """Calls of `norms` go to `run(module, x)` instead."""
    for norm in norms:
        norm.__dict__["forward"] = partial(run, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.__dict__["forward"]


def run_as_it_is(norm: nn.Module, x: Tensor) -> Tensor:
    """What a replaced module would have done."""
    return _BatchNorm.forward(norm, x)  # type: ignore[arg-type]


def find_statistics(norm: nn.Module, x: Tensor) -> Statistics | None:
    """The statistics of a batch, where finding them here is faster than PyTorch's kernel; else None.

    Numerics: sums in the precision of `x`, pairwise, around the mean: about 1e-7 of the variance in float32.
    """
    is_slow_in_pytorch = x.device.type == "cpu" and x.dim() > 2 and x.is_contiguous() and x.numel() > 0
    if not is_slow_in_pytorch or x.dtype not in (torch.float32, torch.float64):
        return None
    B, C = x.shape[:2]
    count = x.numel() // C
    x = x.detach().view(B, C, -1)
    mean = x.sum(-1).sum(0) / count
    variance = torch.linalg.vector_norm(x - mean.view(1, C, 1), dim=-1).square().sum(0) / count
    return Statistics(mean, (variance + norm.eps).rsqrt())


def normalise(norm: nn.Module, x: Tensor, statistics: Statistics) -> Tensor:
    """`norm(x)` in training, from statistics that are known; running statistics are not touched."""
    return _Normalise.apply(x, norm.weight, norm.bias, *statistics, norm.eps)


class _Normalise(torch.autograd.Function):
    """Saves what PyTorch's batch norm saves, in its order, so that it can stand in for it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        variance = inverse.double().pow(-2).sub(eps).to(inverse.dtype)
        return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, weight, mean, inverse = ctx.saved_tensors
        grads = torch.ops.aten.native_batch_norm_backward(
            grad_y, x, weight, None, None, mean, inverse, True, ctx.eps, list(ctx.needs_input_grad[:3])
        )
        return *grads, None, None, None
