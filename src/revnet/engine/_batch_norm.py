"""Batch norm in a replay: keep the statistics of the first run, so that the replay only normalizes.

In training, batch norm spends most of its time on its statistics, and autograd saves them: two numbers for each
channel. They are kept for the replay, which calls the kernel as in evaluation. On a CPU, the results are equal bit for
bit: both times, the kernel computes `x * a + b` for each channel, and the replay passes `a` as the weight, with a
variance of 1.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from revnet._torch_internals import forward_mode_level, in_functorch_transform
from revnet.engine._keeper import AbstractKeeper, Function, num_slots

if TYPE_CHECKING:
    from revnet.engine._record import Saved

_BATCH_NORMS = {_BatchNorm.forward}
# Both read their running statistics only in evaluation, so a replay in training needs no earlier values.
_OTHER_NORMS = {SyncBatchNorm.forward, _InstanceNorm.forward}

WORTHWHILE = 2**18
"""Elements of a stream below which the statistics cost about as much time as the Python calls that keep them."""


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
    is_known = type(module).forward in _BATCH_NORMS | _OTHER_NORMS
    return isinstance(module, _NormBase) and is_known and not _has_own_forward(module)


def _has_own_forward(module: nn.Module) -> bool:
    """Return whether `forward` was set on the instance by a user; then it may do anything."""
    forward = module.__dict__.get("forward")
    # The engine sets it while a residual function runs, perhaps in another thread.
    return forward is not None and not isinstance(forward, _Watched | _Normalizing)


@dataclass(frozen=True, slots=True, eq=False)
class ReplayedNorm:
    """A batch norm in training, and how a replay calls it without changing its statistics."""

    norm: _BatchNorm
    attributes: dict[str, Any]
    """Attributes of the instance. With `track_running_stats` off, PyTorch's `forward` computes the same bits and leaves
    the statistics alone.
    """
    forward: Callable[[Tensor], Tensor] | None
    """Replacement for the module's own `forward`, if that method would still write to them; None for PyTorch's."""


def keeps_statistics(function: nn.Module, norms: Sequence[ReplayedNorm]) -> bool:
    """Return whether the statistics of these batch norms of a function are kept."""
    # Modules inside that keep or rebuild activations by themselves may call the same norms in a replay of their own.
    return len(norms) > 0 and not any(hasattr(module, "policy_units") for module in function.modules())


def replayed_norms_of(function: nn.Module) -> dict[int, ReplayedNorm]:
    """Return the batch norms that a replay may call in another way, by their identity.

    They are PyTorch's own, or marked with `normalizes_as_batch_norm`; they are in training mode and not compiled.
    """
    norms: dict[int, ReplayedNorm] = {}
    for module in function.modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            return {}  # A compiled graph guards on the modules that it was compiled for.
        # A `forward` set on the instance must run. In evaluation, statistics are read and not written.
        if type(module).forward in _BATCH_NORMS and not _has_own_forward(module) and module.training:
            assert isinstance(module, _BatchNorm)
            plain = None if type(module).forward is _BatchNorm.forward else partial(_BatchNorm.forward, module)
            norms[id(module)] = ReplayedNorm(module, module.__dict__, plain)
    return norms


class Statistics(NamedTuple):
    """The statistics of one call of a batch norm in training, (C,) each."""

    mean: Tensor
    inverse_deviation: Tensor


class KeptStatistics(AbstractKeeper):
    """Keeps the statistics of the batch norms of one call of a function.

    Args:
        norms: The batch norms.
    """

    __slots__ = ("_kept", "_norms")

    def __init__(self, norms: Sequence[ReplayedNorm]):
        self._norms = norms
        self._kept: dict[int, Statistics] = {}
        """Statistics by the number of slots that the function had before it called the norm."""

    def recording(self, function: Function, saved: "Saved") -> Function:
        return self._with_forwards(function, lambda norm: _Watched(norm, saved, self._kept))

    def replaying(self, function: Function, name: str, caught: list[Tensor], lasting: set[int]) -> Function:
        return self._with_forwards(function, lambda norm: _Normalizing(norm, self._kept, caught, lasting))

    def _with_forwards(self, function: Function, make: Callable[[_BatchNorm], Function]) -> Function:
        def run(*args: Any) -> Any:
            with _forwards_set(self._norms, make):
                return function(*args)

        return run


@contextmanager
def _forwards_set(norms: Sequence[ReplayedNorm], make: Callable[[_BatchNorm], Function]) -> Iterator[None]:
    forwards = [(norm.attributes, norm.attributes.get("forward"), make(norm.norm)) for norm in norms]
    try:
        for attributes, _, forward in forwards:
            attributes["forward"] = forward
        yield
    finally:
        for attributes, before, forward in forwards:
            if attributes.get("forward") is not forward:
                continue  # Another thread has set its own, and removes it.
            if before is None or isinstance(before, _Watched | _Normalizing):
                del attributes["forward"]
            else:
                attributes["forward"] = before


class _Watched:
    """The forward of a batch norm in a first run, which keeps the statistics that autograd saves."""

    __slots__ = ("_kept", "_norm", "_saved", "_thread")

    def __init__(self, norm: _BatchNorm, saved: "Saved", kept: dict[int, Statistics]):
        self._norm, self._saved, self._kept, self._thread = norm, saved, kept, get_ident()

    def __call__(self, input: Tensor) -> Tensor:
        x, tensors, forward = input, self._saved.tensors, type(self._norm).forward
        if tensors is None or get_ident() != self._thread or not _is_normalized_linearly(x):
            return forward(self._norm, x)
        before = len(tensors)
        y = forward(self._norm, x)
        new = tensors[before:]
        # Autograd saves the input, if it does not outlive the call, and then the statistics.
        if len(new) in (2, 3) and all(tensor.shape == x.shape[1:2] and tensor.grad_fn is None for tensor in new[-2:]):
            mean, inverse_deviation = new[-2:]
            self._kept[before] = Statistics(mean.detach(), inverse_deviation.detach())
        return y


class _Normalizing:
    """The forward of a batch norm in a replay, which uses the statistics of the first run."""

    __slots__ = ("_caught", "_kept", "_lasting", "_norm", "_thread")

    def __init__(self, norm: _BatchNorm, kept: dict[int, Statistics], caught: list[Tensor], lasting: set[int]):
        self._norm, self._kept, self._caught, self._lasting = norm, kept, caught, lasting
        self._thread = get_ident()

    def __call__(self, input: Tensor) -> Tensor:
        x, norm, is_own = input, self._norm, get_ident() == self._thread and not torch.compiler.is_compiling()
        statistics = self._kept.get(num_slots(self._caught, self._lasting)) if is_own else None
        if statistics is None or not _is_normalized_linearly(x):
            # In another thread, this may be a first run.
            return _BatchNorm.forward(norm, x) if is_own else type(norm).forward(norm, x)
        norm._check_input_dim(x)
        return _Normalize.apply(x, norm.weight, norm.bias, statistics.mean, statistics.inverse_deviation, norm.eps)


def _is_normalized_linearly(x: Tensor) -> bool:
    """Return whether the kernel for `x` computes `x * a + b`, with `a` and `b` for each channel."""
    if x.device.type not in ("cpu", "meta") or in_functorch_transform() or forward_mode_level() >= 0:
        return False
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return is_last or x.is_contiguous() or (x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))


class _Normalize(torch.autograd.Function):
    """Batch norm in training with given statistics.

    It saves the tensors that PyTorch's batch norm saves, in the same order, so that it can replace it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        multiplier = inverse if weight is None else inverse * weight
        # As in evaluation (False). With the variance 1 and an epsilon of 0, the kernel multiplies by the weight alone.
        return torch.native_batch_norm(x, multiplier, bias, mean, torch.ones_like(mean), False, 0.0, 0.0)[0]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, weight, mean, inverse = ctx.saved_tensors
        # As in training (True): the statistics come from this batch, and depend on `x`.
        grads = torch.ops.aten.native_batch_norm_backward(
            grad_y, x, weight, None, None, mean, inverse, True, ctx.eps, list(ctx.needs_input_grad[:3])
        )
        return *grads, None, None, None
