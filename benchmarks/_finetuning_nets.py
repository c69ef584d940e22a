"""Ordinary networks of `finetuning.py`, a ResNet-32, a small ViT and a small GPT, and their tasks."""

import io
import pydoc_data.topics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 64
IMAGE_SIZE = 32
CONTEXT = 128


class ConvBlock(nn.Module):
    """A block of a pre-activation ResNet."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
            nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
        )
        changes = stride != 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of shortcut and residual."""
        return self.shortcut(x) + self.residual(x)


class ResNet32(nn.Module):
    """A pre-activation ResNet-32: three stages of five blocks, 16, 32 and 64 channels."""

    def __init__(self, num_outputs: int):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        widths = [16, 16, 32, 64]
        self.stages = nn.ModuleList(
            nn.Sequential(
                *[
                    ConvBlock(widths[stage] if first else width, width, 1 + (first and stage > 0))
                    for first in [True, False, False, False, False]
                ]
            )
            for stage, width in enumerate(widths[1:])
        )
        self.norm = nn.BatchNorm2d(64)
        self.head = nn.Linear(64, num_outputs)

    @property
    def lists(self) -> list[str]:
        """Names of the lists of blocks."""
        return ["stages.0", "stages.1", "stages.2"]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of images."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(x).relu().mean((2, 3)))


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self, dim: int, num_heads: int, *, is_causal: bool):
        super().__init__()
        self.num_heads, self.is_causal = num_heads, is_causal
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention of (B, T, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return self.out(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, *, is_causal: bool):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, num_heads, is_causal=is_causal)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, D)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Trunk(nn.Module):
    """The blocks of a transformer, with the norm and the head after them."""

    def __init__(self, num_outputs: int, dim: int, depth: int, num_heads: int, *, is_causal: bool):
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(dim, num_heads, is_causal=is_causal) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_outputs)

    @property
    def lists(self) -> list[str]:
        """Names of the lists of blocks."""
        return ["blocks"]

    def features(self, x: Tensor) -> Tensor:
        """Return the normalized output of the blocks, (B, T, D)."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class SmallViT(Trunk):
    """A vision transformer: 6 blocks of width 96 on patches of 4x4."""

    def __init__(self, num_outputs: int, dim: int = 96, depth: int = 6):
        super().__init__(num_outputs, dim, depth, 3, is_causal=False)
        self.embed = nn.Conv2d(3, dim, 4, 4)
        self.positions = nn.Parameter(torch.randn((IMAGE_SIZE // 4) ** 2, dim) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of images."""
        return self.head(self.features(self.embed(x).flatten(2).mT + self.positions).mean(1))


class SmallGPT(Trunk):
    """A language model of characters: 6 blocks of width 128, context 128."""

    def __init__(self, num_outputs: int, dim: int = 128, depth: int = 6):
        super().__init__(num_outputs, dim, depth, 4, is_causal=True)
        self.embed, self.positions = nn.Embedding(num_outputs, dim), nn.Embedding(CONTEXT, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, V, T) of tokens (B, T)."""
        return self.head(self.features(self.embed(x) + self.positions.weight[: x.shape[1]])).mT


@dataclass(frozen=True)
class Split:
    """Inputs and targets for training and for the test."""

    x: Tensor
    targets: Tensor
    test_x: Tensor
    test_targets: Tensor
    num_outputs: int


@dataclass(frozen=True)
class Net:
    """A network, the task that it is trained on first, and the one that it is adapted to."""

    make: Callable[[int], nn.Module]
    first: Callable[[Path], Split] | None
    """The first task; None for a network that begins with random weights."""
    second: Callable[[Path], Split]
    keeps_head: bool
    num_epochs: tuple[int, int]
    rates: tuple[float, float]
    batch_size: int = BATCH
    """Number of samples of an update of the second task."""
    methods: tuple[str, ...] = ()
    """Names of the methods; empty for all."""


def cifar(folder: Path, labels: range, num_train: int) -> Split:
    """Return some classes of CIFAR-10, with the same number of training images for each class."""
    import pyarrow.parquet
    from PIL import Image

    parts = []
    for name, most in (("train", num_train // len(labels)), ("test", 1000)):
        rows = pyarrow.parquet.read_table(folder / "cifar10" / f"{name}-00000-of-00001.parquet").to_pylist()
        images, targets, counts = [], [], dict.fromkeys(labels, 0)
        for row in rows:
            if row["label"] in counts and counts[row["label"]] < most:
                counts[row["label"]] += 1
                with Image.open(io.BytesIO(row["img"]["bytes"])) as image:
                    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
                images.append(pixels.view(IMAGE_SIZE, IMAGE_SIZE, 3).permute(2, 0, 1))
                targets.append(row["label"] - labels.start)
        parts += [(torch.stack(images).float() / 255 - 0.47) / 0.25, torch.tensor(targets)]
    return Split(*parts, len(labels))


CHARACTERS = "\n " + "".join(chr(code) for code in range(33, 127))


def characters(text: str) -> Split:
    """Return windows of a text, the last tenth for the test."""
    numbers = torch.tensor([CHARACTERS.index(character) for character in text if character in CHARACTERS])
    cut = len(numbers) * 9 // 10
    parts = []
    for piece in (numbers[:cut], numbers[cut:]):
        windows = piece[: len(piece) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
        parts += [windows[:, :-1], windows[:, 1:]]
    return Split(*parts, len(CHARACTERS))


def shakespeare(folder: Path) -> Split:
    """Return tiny Shakespeare."""
    return characters((folder / "tinyshakespeare" / "input.txt").read_text())


def python_manual(_: Path) -> Split:
    """Return 120,000 characters of the manual that comes with Python."""
    topics = pydoc_data.topics.topics
    return characters("\n".join(topics[name] for name in sorted(topics))[:120_000])


NETS: Mapping[str, Net] = {
    "vit-scratch": Net(
        SmallViT,
        None,
        lambda folder: cifar(folder, range(10), 5_000),
        keeps_head=True,
        num_epochs=(0, 6),
        rates=(0.0, 1e-3),
        methods=("ordinary", "dropout 0.2", "dropout 0.06", "BDIA 1/2", "BDIA 1/4"),
    ),
    "resnet32": Net(
        ResNet32,
        lambda folder: cifar(folder, range(5), 25_000),
        lambda folder: cifar(folder, range(5, 10), 1_000),
        keeps_head=False,
        num_epochs=(4, 8),
        rates=(3e-3, 1e-3),
    ),
    "vit": Net(
        SmallViT,
        lambda folder: cifar(folder, range(5), 25_000),
        lambda folder: cifar(folder, range(5, 10), 1_000),
        keeps_head=False,
        num_epochs=(5, 8),
        rates=(1e-3, 5e-4),
        batch_size=16,
    ),
    "gpt": Net(
        SmallGPT, shakespeare, python_manual, keeps_head=True, num_epochs=(3, 4), rates=(1e-3, 5e-4), batch_size=16
    ),
}
