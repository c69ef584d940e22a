"""Batch norm in a replay: compute its statistics faster than PyTorch does.

In training, batch norm spends its time on reductions, not on normalizing. For a contiguous CPU tensor, sums over rows
take a fifth of the time of PyTorch's reductions, and round no more than a rebuilt stream does anyway.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from revnet._torch_internals import in_functorch_transform

_BATCH_NORMS = {_BatchNorm.forward}
# Both read their running statistics only in evaluation, so a replay in training needs no earlier values.
_OTHER_NORMS = {SyncBatchNorm.forward, _InstanceNorm.forward}

_WORTHWHILE = 2**16  # Elements below which PyTorch's kernel is faster than several calls.
WORTHWHILE = _WORTHWHILE // 4  # Elements of a stream below which its function hardly has activations this large.


BatchNorm = TypeVar("BatchNorm", bound=type[_BatchNorm])


def normalizes_as_batch_norm(norm: BatchNorm) -> BatchNorm:
    """Declare that a subclass of PyTorch's batch norm behaves like batch norm. This is a class decorator.

    Use it for a class with its own `forward` that returns the same bits as PyTorch's, and that differs only in what it
    writes to the running statistics. In training, it must not read the running statistics.
    """
    _BATCH_NORMS.add(norm.forward)
    return norm


def is_torch_norm(module: nn.Module) -> bool:
    """Return whether the module is a normalization of PyTorch, which in training only writes to its statistics."""
    # Compares `forward`, because a subclass's own may read the statistics that it writes.
    is_own = "forward" in module.__dict__  # Set by a user; it may do anything.
    return isinstance(module, _NormBase) and not is_own and type(module).forward in _BATCH_NORMS | _OTHER_NORMS


class Statistics(NamedTuple):
    """The statistics that batch norm computes from its input in training, (C,) each."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ReplayedNorm:
    """A batch norm in training, and how a replay calls it without changing its statistics."""

    attributes: dict[str, Any]
    """Attributes of the instance. With `track_running_stats` off, PyTorch's `forward` computes the same bits and leaves
    the statistics alone.
    """
    forward: Callable[[Tensor], Tensor] | None
    """Replacement for the module's own `forward`, if that would write to them all the same; None for PyTorch's."""
    faster: Callable[[Tensor], Tensor]
    """Replacement for large rebuilt inputs."""


def replayed_norms_of(function: nn.Module) -> dict[int, ReplayedNorm]:
    """Return the batch norms that a replay may call in another way, by their identity.

    They are PyTorch's own, or marked with `normalizes_as_batch_norm`; they are in training mode and not compiled.
    """
    norms: dict[int, ReplayedNorm] = {}
    for module in function.modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            return {}  # A compiled graph guards on the modules that it was compiled for.
        forward = type(module).forward
        # A `forward` set on the instance must run. In evaluation, statistics are read and not written.
        if forward in _BATCH_NORMS and "forward" not in module.__dict__ and module.training:
            assert isinstance(module, _BatchNorm)
            plain = None if forward is _BatchNorm.forward else partial(_BatchNorm.forward, module)
            norms[id(module)] = ReplayedNorm(module.__dict__, plain, partial(_run_again, module))
    return norms


def _run_again(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Call a batch norm whose statistics are currently not tracked."""
    if not (torch.compiler.is_compiling() or in_functorch_transform()):
        statistics = find_statistics(x)
        if statistics is not None:
            return normalize(norm, x, statistics)
    return _BatchNorm.forward(norm, x)


def find_statistics(x: Tensor) -> Statistics | None:
    """Return the statistics of a batch if they are computed faster here than by PyTorch's kernel; else None.

    Numerics:
        Pairwise sums around the mean, in the precision of `x`: about 1e-7 of the variance in float32.
    """
    is_slow_in_pytorch = x.device.type == "cpu" and x.dim() > 2 and x.is_contiguous() and x.numel() >= _WORTHWHILE
    if not is_slow_in_pytorch or x.dtype not in (torch.float32, torch.float64):
        return None
    B, C = x.shape[:2]
    count = x.numel() // C
    # Without a graph: the backward formula of batch norm already includes the gradient through the statistics.
    x = x.detach().view(B, C, -1)
    mean = x.sum(-1).sum(0) / count
    variance = torch.linalg.vector_norm(x - mean.view(1, C, 1), dim=-1).square().sum(0) / count
    return Statistics(mean, variance)


def normalize(norm: nn.Module, x: Tensor, statistics: Statistics) -> Tensor:
    """Return `norm(x)` in training, given the statistics of `x`; running statistics are not changed."""
    return _Normalize.apply(x, norm.weight, norm.bias, *statistics, norm.eps)


class _Normalize(torch.autograd.Function):
    """Saves the tensors that PyTorch's batch norm saves, in the same order, so that it can replace it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.eps = eps
        # As in evaluation, with these as running statistics; otherwise the kernel would compute them again.
        return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, weight, mean, inverse = ctx.saved_tensors
        # As in training (True): the statistics come from this batch, and depend on `x`.
        grads = torch.ops.aten.native_batch_norm_backward(
            grad_y, x, weight, None, None, mean, inverse, True, ctx.eps, list(ctx.needs_input_grad[:3])
        )
        return *grads, None, None, None
