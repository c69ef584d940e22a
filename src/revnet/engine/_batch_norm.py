"""Batch norm in a recomputation: its statistics, found faster than PyTorch finds them.

In training, batch norm spends its time on reductions, not on normalising. Those of a contiguous tensor on the CPU take
a fifth of the time as sums over rows, at the precision of the rounding that a rebuilt stream carries anyway.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from revnet._torch_internals import in_functorch_transform

_BATCH_NORMS = {_BatchNorm.forward}
# Both of these read their running statistics in evaluation only, so a recomputation in training needs no earlier value.
_OTHER_NORMS = {SyncBatchNorm.forward, _InstanceNorm.forward}

_WORTHWHILE = 2**16  # Elements below which PyTorch's kernel is faster than several calls.
WORTHWHILE = _WORTHWHILE // 4  # Elements of a stream below which no activation of its function is as large, likely.


BatchNorm = TypeVar("BatchNorm", bound=type[_BatchNorm])


def normalizes_as_batch_norm(norm: BatchNorm) -> BatchNorm:
    """Have a subclass of PyTorch's batch norm treated as one; a class decorator.

    For a `forward` of its own that gives what PyTorch's gives, bit for bit, and differs only in what it writes to its
    running statistics, which it does not read in training.
    """
    _BATCH_NORMS.add(norm.forward)
    return norm


def is_torch_norm(module: nn.Module) -> bool:
    """Whether the module is a normalisation of PyTorch's own, which in training only writes to its statistics."""
    # Compare `forward`, because a subclass's own may read the statistics that it writes.
    is_own = "forward" in module.__dict__  # Set by a user, and may do anything.
    return isinstance(module, _NormBase) and not is_own and type(module).forward in _BATCH_NORMS | _OTHER_NORMS


class Statistics(NamedTuple):
    """What a batch norm in training finds of its input, (C,) each."""

    mean: Tensor
    variance: Tensor


class ReplayedNorm(NamedTuple):
    """A batch norm in training, and how a second run calls it so that its statistics stay as they are."""

    attributes: dict[str, Any]
    """The instance's attributes. Without `track_running_stats`, PyTorch's `forward` computes the same bits, and touches
    no statistics."""
    forward: Callable[[Tensor], Tensor] | None
    """What to call instead of its own `forward`, which would write to them all the same; None for PyTorch's own."""
    faster: Callable[[Tensor], Tensor]
    """What to call on large rebuilt inputs."""


def replayed_norms_of(function: nn.Module) -> dict[int, ReplayedNorm]:
    """Return the batch norms that a second run may call in another way, by their identity.

    They are PyTorch's own, or marked with `normalizes_as_batch_norm`; in training, and not compiled.
    """
    norms: dict[int, ReplayedNorm] = {}
    for module in function.modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            return {}  # A compiled graph is guarded by the modules that it was made for.
        forward = type(module).forward
        # A `forward` that was set on the instance must run. In evaluation, statistics are read and not written.
        if forward in _BATCH_NORMS and "forward" not in module.__dict__ and module.training:
            assert isinstance(module, _BatchNorm)
            plain = None if forward is _BatchNorm.forward else partial(_BatchNorm.forward, module)
            norms[id(module)] = ReplayedNorm(module.__dict__, plain, partial(_run_again, module))
    return norms


def _run_again(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Call a batch norm whose statistics are not tracked at the moment."""
    if not (torch.compiler.is_compiling() or in_functorch_transform()):
        statistics = find_statistics(x)
        if statistics is not None:
            return normalize(norm, x, statistics)
    return _BatchNorm.forward(norm, x)


def find_statistics(x: Tensor) -> Statistics | None:
    """The statistics of a batch, where finding them here is faster than PyTorch's kernel; else None.

    Numerics: sums in the precision of `x`, pairwise, around the mean: about 1e-7 of the variance in float32.
    """
    is_slow_in_pytorch = x.device.type == "cpu" and x.dim() > 2 and x.is_contiguous() and x.numel() >= _WORTHWHILE
    if not is_slow_in_pytorch or x.dtype not in (torch.float32, torch.float64):
        return None
    B, C = x.shape[:2]
    count = x.numel() // C
    # Without a graph: the backward formula of batch norm takes the gradient through the statistics, too.
    x = x.detach().view(B, C, -1)
    mean = x.sum(-1).sum(0) / count
    variance = torch.linalg.vector_norm(x - mean.view(1, C, 1), dim=-1).square().sum(0) / count
    return Statistics(mean, variance)


def normalize(norm: nn.Module, x: Tensor, statistics: Statistics) -> Tensor:
    """`norm(x)` in training, from statistics that are known; running statistics are not touched."""
    return _Normalize.apply(x, norm.weight, norm.bias, *statistics, norm.eps)


class _Normalize(torch.autograd.Function):
    """Saves what PyTorch's batch norm saves, in its order, so that it can stand in for it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.eps = eps
        # As in evaluation, with these for the running statistics: otherwise the kernel would find them once more.
        return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, weight, mean, inverse = ctx.saved_tensors
        # As in training (True): the statistics are of this batch, and depend on `x`.
        grads = torch.ops.aten.native_batch_norm_backward(
            grad_y, x, weight, None, None, mean, inverse, True, ctx.eps, list(ctx.needs_input_grad[:3])
        )
        return *grads, None, None, None
