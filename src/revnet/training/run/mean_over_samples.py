"""A mean over the samples of all processes."""

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanOverSamples(Metric):
    """Mean of a figure over all samples of an epoch, from its means over batches.

    Lightning's own mean rounds the number of samples per process to an integer, and `torchmetrics.MeanMetric` ignores
    weights unless it searches each value for NaN, which makes a GPU wait.
    """

    higher_is_better = None
    full_state_update = False
    total: Tensor
    num_samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("num_samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, mean: Tensor, num_samples: int) -> None:
        """Add a batch."""
        self.total = self.total + mean.float() * num_samples
        self.num_samples = self.num_samples + num_samples

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.num_samples
