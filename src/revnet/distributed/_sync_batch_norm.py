"""Batch norms that use the statistics of all processes."""

import weakref

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.module import _WrappedHook

from revnet._checks import check_module
from revnet.nn._batch_norm import AbstractAveragingBatchNorm2d, average_batches

_FORWARDS = {_BatchNorm.forward, AbstractAveragingBatchNorm2d.forward}
"""What a synchronized batch norm computes, but for one process."""


class SyncBatchNorm2d(nn.SyncBatchNorm):
    """A `torch.nn.SyncBatchNorm` with the running statistics of `BatchNorm2dBiased` or `BatchNorm2dUnbiased`.

    Experimental: it has not been tested on several GPUs.

    Args:
        norm: The batch norm of a single process. Its tensors are shared, not copied. The running variance stays biased
            if it is a `BatchNorm2dBiased`.
    """

    def __init__(self, norm: AbstractAveragingBatchNorm2d) -> None:
        super().__init__(norm.num_features, device="meta")
        self._is_biased = norm.is_biased
        _take_over(self, norm)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the input by the statistics of all processes. In training, also update the running statistics."""
        mean, variance = self.running_mean, self.running_var
        is_averaging = self.training and self.track_running_stats and self.momentum != 0
        if not is_averaging or mean is None or variance is None:
            return super().forward(input)
        earlier_mean, earlier_variance = mean.clone(), variance.clone()
        momentum = self.momentum
        self.momentum = 1.0  # leaves the statistics of this batch in the buffers
        try:
            y = super().forward(input)
        finally:
            self.momentum = momentum
        average_batches(self, earlier_mean, earlier_variance, self._num_values(input) if self._is_biased else None)
        return y

    def _num_values(self, input: Tensor) -> Tensor:
        """Return the number of values per channel in all processes together."""
        num_values = torch.tensor(input.numel() / input.shape[1], dtype=torch.float64, device=input.device)
        if distributed.is_initialized():
            distributed.all_reduce(num_values, group=self.process_group)
        return num_values


def synchronize_batch_norms(model: nn.Module) -> int:
    """Replace the batch norms in `model` by synchronized ones, in place, and return their number.

    A synchronized batch norm normalizes by the statistics of all processes. Unlike
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, this keeps the running statistics of `BatchNorm2dBiased` and
    `BatchNorm2dUnbiased` as they define them. Parameters and buffers stay the same tensors, with the same names, so an
    optimizer that exists already stays valid. Hooks and other attributes are kept, and a batch norm that has several
    names in `model` is replaced under all of them.
    Experimental: this has not been tested on several GPUs.

    Args:
        model: A model that contains batch norms. It is changed in place.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` is a batch norm itself, which cannot be replaced in place. Or it contains one that does
            something else, in a `forward` or parametrization of its own, or whose size is not yet known.

    Example:
        >>> from revnet import create_model
        >>> from revnet.distributed import synchronize_batch_norms
        >>> model = create_model("resnet32")
        >>> synchronize_batch_norms(model)
        31
    """
    check_module("model", model)
    if isinstance(model, _BatchNorm) and not isinstance(model, nn.SyncBatchNorm):
        raise ValueError(
            f"`model` (={type(model).__name__}) is a batch norm, which cannot be replaced in place; pass the model "
            "that contains it."
        )
    norms: list[_BatchNorm] = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            _check_norm(name, module)
            norms.append(module)
    replaced: dict[nn.Module | None, nn.Module] = {norm: _synchronized(norm) for norm in norms}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # `named_children` leaves out second names.
            if child in replaced:
                setattr(parent, name, replaced[child])
    return len(replaced)


def _check_norm(name: str, norm: _BatchNorm) -> None:
    # An activation after the norm, for instance, as in timm.
    has_own_forward = type(norm).forward not in _FORWARDS or "forward" in vars(norm)
    if has_own_forward or norm._modules:
        own = "`forward`" if has_own_forward else "parametrization"
        raise ValueError(
            f"`{name}` (={type(norm).__name__}) has a {own} of its own, which a synchronized batch norm would leave "
            "out; use a plain batch norm, and put the rest into a module next to it."
        )
    if isinstance(norm, _LazyNormBase) and norm.has_uninitialized_params():
        raise ValueError(
            f"`{name}` (={type(norm).__name__}) does not know its number of features yet; call the model once, under "
            "`torch.no_grad()`, before its batch norms are replaced."
        )


def _synchronized(norm: _BatchNorm) -> nn.Module:
    if isinstance(norm, AbstractAveragingBatchNorm2d):
        return SyncBatchNorm2d(norm)
    synchronized = nn.SyncBatchNorm(norm.num_features, device="meta")
    _take_over(synchronized, norm)
    return synchronized


def _take_over(synchronized: nn.SyncBatchNorm, norm: _BatchNorm) -> None:
    """Give a synchronized batch norm the tensors, hooks and all other attributes of a batch norm."""
    attributes = dict(vars(norm))
    attributes.pop("_compiled_call_impl", None)  # It calls `norm`.
    # The same dicts of hooks, so that handles can still remove them.
    vars(synchronized).update(attributes)
    for hook in norm._load_state_dict_pre_hooks.values():
        if isinstance(hook, _WrappedHook) and hook.with_module:
            hook.module = weakref.ref(synchronized)
