"""Models and data as a user writes them, for settings that take an import path."""

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import revnet
from revnet.conversion import Dr2Net
from revnet.models import RevNet


def tiny_revnet(num_classes: int, in_channels: int) -> RevNet:
    return RevNet(num_blocks=(2, 1), widths=(8, 8, 16), num_classes=num_classes, in_channels=in_channels)


class Perceptron(nn.Module):
    """A network without reversible blocks, which takes no arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(images.flatten(1)).relu())


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).tanh()


def converted() -> nn.Module:
    """Return a network whose blocks `revnet.convert` has made reversible."""
    blocks = nn.Sequential(*[_Residual() for _ in range(4)])
    revnet.convert(blocks, Dr2Net(0.5, 0.5))
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), blocks, nn.Linear(16, 10))


NOT_A_MODEL = 3


def raises():
    raise OSError("the user's own error")


class Noise(LightningDataModule):
    """Images of noise with four classes."""

    num_classes = 4

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(48, 1, 8, 8, generator=generator)
        self.data = TensorDataset(images, torch.arange(48) % 4)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.data, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.data, batch_size=16)


class NoiseInBytes(Noise):
    def setup(self, stage: str) -> None:
        super().setup(stage)
        images, labels = self.data.tensors
        self.data = TensorDataset((images * 40 + 128).clamp(0, 255).to(torch.uint8), labels)


class OnlyTraining(Noise):
    val_dataloader = LightningDataModule.val_dataloader


class WrongLabels(Noise):
    num_classes = 3
