"""Batch norms that use the statistics of all processes."""

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from revnet._checks import check_module
from revnet.nn._batch_norm import AbstractAveragingBatchNorm2d, average_batches


class SyncBatchNorm2d(nn.SyncBatchNorm):
    """A `torch.nn.SyncBatchNorm` with the running statistics of `BatchNorm2dBiased` or `BatchNorm2dUnbiased`.

    Experimental: it has not been tested on several GPUs.

    Args:
        norm: The batch norm of a single process. Its tensors are shared, not copied. The running variance stays biased
            if it is a `BatchNorm2dBiased`.
    """

    def __init__(self, norm: AbstractAveragingBatchNorm2d) -> None:
        device = None if norm.running_mean is None else norm.running_mean.device
        super().__init__(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device=device
        )
        self._is_biased = norm.is_biased
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(self, name, buffer)
        self.train(norm.training)

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
    optimizer that exists already stays valid.
    Experimental: this has not been tested on several GPUs.

    Args:
        model: A model that contains batch norms. It is changed in place.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` is a batch norm itself, which cannot be replaced in place.

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
    return _replace_norms(model)


def _replace_norms(model: nn.Module) -> int:
    count = 0
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
            setattr(model, name, _synchronized(child))
            count += 1
        else:
            count += _replace_norms(child)
    return count


def _synchronized(norm: _BatchNorm) -> nn.Module:
    if isinstance(norm, AbstractAveragingBatchNorm2d):
        return SyncBatchNorm2d(norm)
    return nn.SyncBatchNorm.convert_sync_batchnorm(norm)
