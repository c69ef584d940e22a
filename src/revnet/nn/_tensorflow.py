"""Layers that compute what TensorFlow computes, for networks whose reference was trained there."""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnet._checks import MOST_CHANNELS, check_count, check_share, check_tensor, describe, is_number
from revnet.engine import normalizes_as_batch_norm

_MOST_PIXELS = 2**15
"""Largest kernel and stride."""
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

    Example:
        >>> import torch
        >>> from revnet.nn import BatchNorm2dBiased
        >>> norm = BatchNorm2dBiased(1, momentum=1.0)
        >>> _ = norm(torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1))
        >>> norm.running_var  # `torch.nn.BatchNorm2d` says 2
        tensor([1.])
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
        # A converter builds a norm of its own class, which would silently average the unbiased variance. It calls none
        # of our methods, so reading this attribute is the only chance to raise.
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
        old_part = running_var.clone()
        y = super().forward(x)
        # PyTorch's kernel computed `(1 - momentum) * old + momentum * unbiased`. Subtract 1/n of the second term.
        old_part.mul_(1 - self._weight_of_batch())
        # Autograd has saved the running variance, though it will not read it, and would refuse a newer version.
        # `data` has a version of its own. Exported graphs have no versions, and `data` would not be the buffer there.
        target = running_var if torch.compiler.is_exporting() else running_var.data
        target.lerp_(old_part, x.shape[1] / x.numel())
        return y

    def _weight_of_batch(self) -> float:
        """Return the weight of the newest batch in the running statistics, as PyTorch computes it."""
        if self.momentum is not None:
            return self.momentum
        return 1 / float(self.num_batches_tracked) if self.num_batches_tracked is not None else 0.0


class Conv2dSame(nn.Conv2d):
    """Convolution whose output has size `ceil(input / stride)`, padded like TensorFlow's SAME.

    With stride 1 this is the usual centered padding. With stride 2, a 3x3 kernel and an even input, it pads one pixel
    at the right and bottom. PyTorch's `padding=1` pads the left and top as well, so the two see images that are shifted
    by a pixel. Networks whose reference was trained in TensorFlow need this convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the square kernel.
        stride: Step of the kernel in both directions.

    Shape:
        x: (B, in_channels, H, W). Output: (B, out_channels, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: An argument is not a positive integer.
        TypeError: In the forward pass: `x` is not a tensor.

    Example:
        >>> import torch
        >>> from revnet.nn import Conv2dSame
        >>> Conv2dSame(3, 8, kernel_size=3, stride=2)(torch.rand(1, 3, 9, 9)).shape
        torch.Size([1, 8, 5, 5])
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        check_count("in_channels", in_channels, most=MOST_CHANNELS)
        check_count("out_channels", out_channels, most=MOST_CHANNELS)
        check_count("kernel_size", kernel_size, most=_MOST_PIXELS, hint="the kernel is square")
        check_count("stride", stride, most=_MOST_PIXELS, hint="it is the same in both directions")
        # A 1x1 kernel needs no padding. `F.pad` would copy the input even then, and autograd would hold the copy.
        centered = kernel_size == 1 or (stride == 1 and kernel_size % 2 == 1)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2 if centered else 0,
            bias=False,
        )
        self._centered = centered

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve `x`."""
        if not isinstance(x, Tensor):
            check_tensor("x", x)
        if not self._centered:
            if x.dim() < 3:
                raise ValueError(
                    f"`x` (of shape {tuple(x.shape)}) must be (B, {self.in_channels}, H, W), a batch of images."
                )
            vertical = _same_padding(x.shape[-2], self.kernel_size[0], self.stride[0])
            horizontal = _same_padding(x.shape[-1], self.kernel_size[1], self.stride[1])
            x = F.pad(x, (*horizontal, *vertical))
        return super().forward(x)


def _same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Return the pixels to add before and after a side of `size`."""
    num_outputs = -(-size // stride)
    total = max((num_outputs - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2
