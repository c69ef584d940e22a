"""Batch norm with the running statistics of TensorFlow."""

import sys

import torch
from torch import Tensor, nn

from revnet._checks import MOST_CHANNELS, check_count, check_share, check_tensor, describe, is_number
from revnet.engine import normalizes_as_batch_norm

_CONVERTERS = {"convert_sync_batchnorm", "convert_syncbn_model"}
"""Functions of PyTorch, timm and apex that replace each batch norm by a synchronized one."""


@normalizes_as_batch_norm
class BatchNorm2dBiased(nn.BatchNorm2d):
    """Batch norm whose running variance averages the *biased* variance of the batches, as in TensorFlow.

    The output equals the output of `torch.nn.BatchNorm2d`, in training mode bit for bit. The running variance of
    PyTorch, however, averages the unbiased variance, which is larger by the factor `n / (n - 1)` for `n` values per
    channel. For 100 images of 10x10 pixels the difference is one part in ten thousand, and for two images of 1x2 pixels
    a third. The state dict fits either class.

    `torch.nn.SyncBatchNorm` averages the unbiased variance too, so `convert_sync_batchnorm` raises an error for this
    class. Replace the norms by `torch.nn.BatchNorm2d` first if you want to synchronize them.

    Args:
        num_features: Channels of the input.
        eps: Number that is added to the variance.
        momentum: Weight of the newest batch in the running statistics. A decay of 0.99 in TensorFlow is a momentum of
            0.01. None averages all batches with equal weight, as in `torch.nn.BatchNorm2d`.

    Shape:
        x: (B, num_features, H, W). Output: the same.

    Raises:
        ValueError: `num_features` is not a positive integer, `eps` is negative, or `momentum` is neither None nor a
            number from 0 to 1.
    """

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float | None = 0.1):
        check_count("num_features", num_features, most=MOST_CHANNELS)
        if not is_number(eps) or eps < 0:
            raise ValueError(f"`eps` (={describe(eps)}) must be a number, 0 or more; 1e-5 is usual.")
        if momentum is not None:
            check_share(momentum=momentum, below_one=False)
        super().__init__(num_features, eps=eps, momentum=momentum)

    @property
    def affine(self) -> bool:
        """Whether the norm has a weight and a bias."""
        # A converter builds a norm of its own class, which would silently average the unbiased variance. It reads this
        # attribute of ours, calls no method of ours, and offers no other place to object.
        if sys._getframe(1).f_code.co_name in _CONVERTERS:
            raise NotImplementedError(
                "a BatchNorm2dBiased cannot become an `nn.SyncBatchNorm`, which averages the unbiased variance; leave "
                "it unsynchronized, or replace it by an `nn.BatchNorm2d`, which takes its state dict, and convert that."
            )
        affine: bool = self.__dict__["affine"]
        return affine

    @affine.setter
    def affine(self, affine: bool) -> None:
        self.__dict__["affine"] = affine

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`. In training mode, also update the running statistics."""
        if not isinstance(x, Tensor):
            check_tensor("x", x)
        running_var = self.running_var
        if not (self.training and self.track_running_stats) or running_var is None:
            return super().forward(x)
        kept = running_var.clone()
        y = super().forward(x)
        # PyTorch's kernel added `momentum * unbiased` to what it kept of the old value. Of that, 1/n must go.
        kept.mul_(1 - self._weight_of_batch())
        # Autograd has saved the running variance, though it will not read it, and would refuse a newer version.
        # `data` has a version of its own. Exported graphs have no versions, and `data` would not be the buffer there.
        target = running_var if torch.compiler.is_exporting() else running_var.data
        target.lerp_(kept, x.shape[1] / x.numel())
        return y

    def _weight_of_batch(self) -> float:
        """Return the weight that the newest batch has just got, as PyTorch computes it."""
        if self.momentum is not None:
            return self.momentum
        return 1 / float(self.num_batches_tracked) if self.num_batches_tracked is not None else 0.0
