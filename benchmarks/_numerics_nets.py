"""Networks and data of `numerics.py`."""

import torch
from torch import Tensor, nn

from revnet import ReversibleBlock, ReversibleSequential
from revnet.data import load_dataset


def perceptron(width: int, scale: float) -> nn.Sequential:
    """Return a residual function with PyTorch's initial weights times `scale`."""
    function = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    with torch.no_grad():
        for parameter in function.parameters():
            parameter.mul_(scale)
    return function


def perceptrons(depth: int, width: int, scale: float) -> ReversibleSequential:
    """Return blocks without normalization, so the amplification of their weights remains."""
    return ReversibleSequential(
        *[ReversibleBlock(perceptron(width, scale), perceptron(width, scale)) for _ in range(depth)]
    )


class PerceptronClassifier(nn.Module):
    """A linear stem, perceptron blocks and a linear head."""

    def __init__(self, depth: int, width: int, scale: float):
        super().__init__()
        self.stem = nn.Linear(64, 2 * width)
        self.blocks = perceptrons(depth, width, scale)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x.flatten(1))))


class Digits:
    """Batches of the training images of digits, which depend only on the seed."""

    def __init__(self, batch_size: int, seed: int):
        split = load_dataset("digits").train
        images = split.images.float()
        self.images = (images - images.mean()) / images.std()
        self.labels = split.labels
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(self.labels), (self._batch_size,), generator=self._generator)
        return self.images[index], self.labels[index]
