"""Synthetic volumes: noise with slightly brighter balls, and the masks of the balls."""

from collections.abc import Iterator

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


def batches(batch_size: int, size: int, seed: int) -> Iterator[Batch]:
    """Yield volumes, (B, 1, D, H, W), and their masks, bool, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield balls(batch_size, size, generator)


def balls(count: int, size: int, generator: torch.Generator) -> Batch:
    """Return volumes with one ball each, brighter than the rest by one standard deviation of the noise."""
    axis = torch.arange(size)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    centers = torch.rand(count, 3, 1, 1, 1, generator=generator) * (size / 2) + size / 4
    radii = torch.rand(count, 1, 1, 1, generator=generator) * (size / 8) + size / 6
    masks = (grid - centers).square().sum(1).sqrt() < radii
    noise = torch.randn(count, size, size, size, generator=generator)
    return (masks + noise).unsqueeze(1), masks.unsqueeze(1)


def dice(predicted: Tensor, masks: Tensor) -> float:
    """Return the Dice coefficient of two masks."""
    return (2 * (predicted & masks).sum() / (predicted.sum() + masks.sum())).item()
