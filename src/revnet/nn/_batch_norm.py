"""Batch norm as TensorFlow keeps its running statistics."""

from torch import Tensor, nn

from revnet.engine import normalizes_as_batch_norm


@normalizes_as_batch_norm
class BatchNorm2dBiased(nn.BatchNorm2d):
    """Batch norm whose running variance averages the *biased* variance of the batches, as TensorFlow's does.

    It normalises as `torch.nn.BatchNorm2d` does, in training bit for bit. PyTorch's running variance, however, averages
    the unbiased variance, which is larger by `n / (n - 1)` for `n` values a channel: one part in ten thousand for 100
    images of 10x10, a third for the four values of two images of 1x2. A state dict fits either class.

    Args:
        num_features: Channels of the input.
        eps: Added to the variance.
        momentum: Weight of the newest batch in the running statistics; TensorFlow's moving average of 0.99 is 0.01.

    Shape:
        x: (B, num_features, H, W). Output: the same.

    Raises:
        ValueError: `momentum` is None, PyTorch's cumulative average, or not in 0..1.
    """

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1):
        if momentum is None or not 0 <= momentum <= 1:
            raise ValueError(f"`momentum` (={momentum}) must be a number from 0 to 1; 0.1 is usual.")
        super().__init__(num_features, eps=eps, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`, and in training update the running statistics."""
        if not self.training:
            return super().forward(x)
        assert self.running_var is not None
        assert self.momentum is not None
        kept = self.running_var * (1 - self.momentum)
        y = super().forward(x)
        # What the batch adds is `unbiased * momentum`; of it, the share 1/n has to go. Like the kernel before it, this
        # must not raise the version of a tensor that autograd has saved (and will not read): hence `data`.
        self.running_var.data.lerp_(kept, x.shape[1] / x.numel())
        return y
