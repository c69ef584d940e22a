"""Volumes made on the spot: noise in which balls are a little brighter, and where the balls are."""

from collections.abc import Iterator

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


def batches(batch_size: int, size: int, seed: int) -> Iterator[Batch]:
    """Without end: volumes (B, 1, D, H, W) and their masks, bool."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield balls(batch_size, size, generator)


def balls(count: int, size: int, generator: torch.Generator) -> Batch:
    """One ball a volume, as bright above the rest as the noise deviates: no voxel tells by itself."""
    axis = torch.arange(size)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    centres = torch.rand(count, 3, 1, 1, 1, generator=generator) * (size / 2) + size / 4
    radii = torch.rand(count, 1, 1, 1, generator=generator) * (size / 8) + size / 6
    masks = (grid - centres).square().sum(1).sqrt() < radii
    noise = torch.randn(count, size, size, size, generator=generator)
    return (masks + noise).unsqueeze(1), masks.unsqueeze(1)


def dice(found: Tensor, masks: Tensor) -> float:
    """Twice what both have in common, as a share of both."""
    return (2 * (found & masks).sum() / (found.sum() + masks.sum())).item()
