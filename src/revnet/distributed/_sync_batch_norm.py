"""Batch norms that use the statistics of all processes."""

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from revnet.nn import BatchNorm2dBiased


class SyncBatchNorm2dBiased(nn.SyncBatchNorm):
    """A `torch.nn.SyncBatchNorm` whose running variance averages the *biased* variance, as `BatchNorm2dBiased` does.

    Experimental: it has not been tested on several GPUs.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the input by the statistics of all processes. In training, also update the running statistics."""
        running_var = self.running_var
        if not (self.training and self.track_running_stats) or running_var is None:
            return super().forward(input)
        before = running_var.clone()
        y = super().forward(input)
        # PyTorch computed `(1 - momentum) * before + momentum * unbiased`. Subtract 1/n of the second term, where all
        # processes together have n values per channel.
        num_values = torch.tensor(input.numel() / input.shape[1], dtype=torch.float64, device=input.device)
        if distributed.is_initialized():
            distributed.all_reduce(num_values, group=self.process_group)
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked or 1)
        running_var.data.lerp_(before.mul_(1 - momentum), (1 / num_values).to(running_var.dtype))
        return y


def synchronize_batch_norms(model: nn.Module) -> int:
    """Replace the batch norms of `model` by synchronized ones, in place, and return their number.

    Parameters and buffers stay the same tensors, with the same names. Running variances that were biased stay biased.
    Experimental: this has not been tested on several GPUs.
    """
    count = 0
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
            setattr(model, name, _synchronized(child))
            count += 1
        else:
            count += synchronize_batch_norms(child)
    return count


def _synchronized(norm: _BatchNorm) -> nn.Module:
    if not isinstance(norm, BatchNorm2dBiased):
        return nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    sync = SyncBatchNorm2dBiased(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        device=None if norm.running_mean is None else norm.running_mean.device,
    )
    sync.weight, sync.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers():
        setattr(sync, name, buffer)
    sync.train(norm.training)
    return sync
