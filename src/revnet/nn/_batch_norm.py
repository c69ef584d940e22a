"""Batch norms whose running statistics fit the network from the first updates on.

Training does not read the running statistics; evaluation does. They are moving averages that PyTorch starts at mean 0
and variance 1, and with a decay of 0.99 a third of that start is left after 100 batches. A plain mean hardly helps: the
weights change most in the first updates, whose statistics may be a hundred times larger than the later ones. So the
averages cover few batches at first, as in `tf.train.ExponentialMovingAverage(num_updates=...)`:

    weight of batch n = max(momentum, 10 / (n + 9))

The first batch replaces the start, later batches the earlier ones, and from batch 991 on, a momentum of 0.01 is the
weight.

The number of batches is the buffer `num_batches_tracked`. It is read on the device and never copied to the CPU, so that
CUDA graphs, `torch.compile(fullgraph=True)` and `torch.export` work in training mode.
"""

import sys
from abc import ABC
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from revnet._checks import MOST_CHANNELS, check_count, check_share, check_tensor, describe, is_number
from revnet._torch_release import is_exporting
from revnet.engine import normalizes_as_batch_norm
from revnet.engine._keep import not_keeping
from revnet.engine._self_contained import self_contained

_CONVERTERS = {"convert_sync_batchnorm", "convert_syncbn_model"}
"""Functions of PyTorch, timm and apex that replace each batch norm by a synchronized one."""
_DELAY = 9
"""Batch n has at least the weight `(1 + _DELAY) / (n + _DELAY)`; with 0, the averages would be plain means."""
_MANY_BATCHES = 2**20
"""Number of batches that running statistics of unknown age count as."""


@normalizes_as_batch_norm
class AbstractAveragingBatchNorm2d(nn.BatchNorm2d, ABC):
    """The base of the batch norms in this module; the arguments are theirs."""

    is_biased: ClassVar[bool]
    """Whether the running variance averages the biased variance of the batches."""

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float | None = 0.1):
        check_count("num_features", num_features, most=MOST_CHANNELS)
        if not is_number(eps) or eps < 0:
            raise ValueError(f"`eps` (={describe(eps)}) must be a number, 0 or more; 1e-5 is usual.")
        if momentum is not None:
            check_share(momentum=momentum, below_one=False)
        super().__init__(num_features, eps=eps, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`. In training mode, also update the running statistics."""
        if not isinstance(x, Tensor):
            check_tensor("x", x)
        mean, variance = self.running_mean, self.running_var
        is_averaging = self.training and self.track_running_stats and self.momentum != 0
        if not is_averaging or mean is None or variance is None:
            return super().forward(x)
        self._check_input_dim(x)
        earlier_mean, earlier_variance = mean.clone(), variance.clone()
        # With a momentum of 1, the kernel leaves the statistics of this batch in the buffers.
        y = F.batch_norm(x, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        num_values = x.numel() / x.shape[1] if self.is_biased and x.numel() > 0 else None
        with nullcontext() if torch.compiler.is_compiling() else not_keeping():
            average_batches(self, earlier_mean, earlier_variance, num_values)
        return y

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _add_missing_count(self, state_dict, prefix, args[0])
        super()._load_from_state_dict(state_dict, prefix, *args)


@self_contained
class BatchNorm2dBiased(AbstractAveragingBatchNorm2d):
    """Batch norm whose running variance averages the *biased* variance of the batches, as in TensorFlow.

    The output equals the output of `torch.nn.BatchNorm2d`, in training mode bit for bit. The running statistics differ
    in two ways:

    - The running variance of PyTorch averages the unbiased variance, which is larger by the factor `n / (n - 1)` for
      `n` values per channel. For 100 images of 10x10 pixels the difference is one part in ten thousand, and for two
      images of 1x2 pixels a third.
    - The running statistics of PyTorch start at mean 0 and variance 1. Here they fit the network after a few batches,
      as in `BatchNorm2dUnbiased`.

    The state dict fits either class.

    `torch.nn.SyncBatchNorm` averages the unbiased variance too, so `convert_sync_batchnorm` raises an error for this
    class. `revnet.distributed.synchronize_batch_norms` synchronizes it, and keeps the biased variance.

    Args:
        num_features: Channels of the input.
        eps: Number that is added to the variance.
        momentum: Smallest weight of the newest batch in the running statistics. A decay of 0.99 in TensorFlow is a
            momentum of 0.01. None averages all batches with equal weight, and 0 leaves the running statistics as they
            are; both as in `torch.nn.BatchNorm2d`.

    Shape:
        x: (B, num_features, H, W). Output: the same.

    Raises:
        ValueError: `num_features` is not a positive integer, `eps` is negative, or `momentum` is neither None nor a
            number from 0 to 1.

    Example:
        >>> import torch
        >>> from revnet.nn import BatchNorm2dBiased
        >>> norm = BatchNorm2dBiased(1)
        >>> _ = norm(torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1))
        >>> norm.running_mean, norm.running_var  # PyTorch's norm: 0.2 and 1.1
        (tensor([2.]), tensor([1.]))
    """

    is_biased = True

    @property
    def affine(self) -> bool:
        """Whether the norm has a weight and a bias."""
        # A converter builds a norm of its own class, which would silently average the unbiased variance. It calls none
        # of our methods, so reading this attribute is the only chance to raise.
        if sys._getframe(1).f_code.co_name in _CONVERTERS:
            raise NotImplementedError(
                "a BatchNorm2dBiased cannot become an `nn.SyncBatchNorm`, which averages the unbiased variance; call "
                "`revnet.distributed.synchronize_batch_norms(model)` instead, which keeps the biased variance."
            )
        affine: bool = self.__dict__["affine"]
        return affine

    @affine.setter
    def affine(self, affine: bool) -> None:
        self.__dict__["affine"] = affine


@self_contained
class BatchNorm2dUnbiased(AbstractAveragingBatchNorm2d):
    """`torch.nn.BatchNorm2d` whose running statistics fit the network after a few batches.

    The output equals the output of `torch.nn.BatchNorm2d`, in training mode bit for bit, and the state dict fits either
    class. The running statistics of PyTorch start at mean 0 and variance 1, and forget that only after some
    `3 / momentum` batches; a network that was trained for less cannot be evaluated. Here the newest of `n` batches has
    the weight `max(momentum, 10 / (n + 9))`: the first batch replaces the start, and the statistics of the first
    batches, during which the network changes most, are soon forgotten.

    Args:
        num_features: Channels of the input.
        eps: Number that is added to the variance.
        momentum: Smallest weight of the newest batch in the running statistics. None averages all batches with equal
            weight, and 0 leaves the running statistics as they are; both as in `torch.nn.BatchNorm2d`.

    Shape:
        x: (B, num_features, H, W). Output: the same.

    Raises:
        ValueError: `num_features` is not a positive integer, `eps` is negative, or `momentum` is neither None nor a
            number from 0 to 1.

    Example:
        >>> import torch
        >>> from revnet.nn import BatchNorm2dUnbiased
        >>> norm = BatchNorm2dUnbiased(1)
        >>> _ = norm(torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1))
        >>> norm.running_mean, norm.running_var  # PyTorch's norm: 0.2 and 1.1
        (tensor([2.]), tensor([2.]))
    """

    is_biased = False


def average_batches(
    norm: _BatchNorm, earlier_mean: Tensor, earlier_variance: Tensor, num_values: float | Tensor | None
) -> None:
    """Average the statistics of the newest batch with the earlier ones, in the buffers of `norm`.

    Args:
        norm: Batch norm, whose buffers hold the mean and the unbiased variance of the newest batch. It has counted that
            batch.
        earlier_mean: Average of the earlier means, (C,).
        earlier_variance: Average of the earlier variances, (C,).
        num_values: Values per channel in the batch, for averages of the biased variance; None for the unbiased one.
    """
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    if not is_exporting():
        # Autograd has saved the buffers, though it will not read them, and would refuse a newer version. `data` has a
        # version of its own. Exported graphs have no versions, and `data` would not be the buffer there.
        mean, variance = mean.data, variance.data
    count, momentum = norm.num_batches_tracked, norm.momentum
    share_of_earlier: Tensor | float
    if count is None:
        share_of_earlier = 1 - (momentum or 0.0)
    elif momentum is None:
        count = count.to(torch.promote_types(mean.dtype, torch.float32))
        share_of_earlier = (1 - count.reciprocal()).to(mean.dtype)
    else:
        # From some count on, the weight is the momentum. The limit also turns the count into a floating-point number
        # that every dtype can hold.
        count = count.clamp(max=(1 + _DELAY) / momentum - _DELAY).to(mean.dtype)
        share_of_earlier = torch.rsub(count.add_(_DELAY).reciprocal_(), 1, alpha=1 + _DELAY)
    if num_values is not None:
        variance.mul_(1 - 1 / num_values)
    mean.lerp_(earlier_mean, share_of_earlier)
    variance.lerp_(earlier_variance, share_of_earlier)


def _add_missing_count(
    norm: _BatchNorm, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Let running statistics without a count of batches, as PyTorch wrote them before 0.4.1, keep their weight.

    PyTorch would count from 0, and the first batch would replace the statistics.
    """
    version = local_metadata.get("version")
    key = f"{prefix}num_batches_tracked"
    is_old = (version is None or version < 2) and f"{prefix}running_mean" in state_dict and key not in state_dict
    if is_old and norm.track_running_stats:
        state_dict[key] = torch.tensor(_MANY_BATCHES)
