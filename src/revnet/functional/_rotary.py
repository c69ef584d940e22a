"""Rotary positions: queries and keys are turned by an angle that grows with their position.

The product of a turned query and a turned key depends on how far apart they are, and on nothing else of where they are.

References:
    Su et al. (2021), RoFormer: Enhanced Transformer with Rotary Position Embedding, section 3.2.
"""

import torch
from torch import Tensor

_LONGEST_WAVE = 10_000.0
"""The base of the frequencies, as RoFormer has it."""


def rotary_table(
    length: int, head_dim: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Cosines and sines of the angles by which `rotate` turns; one table serves all layers.

    Args:
        length: The number of positions, T.
        head_dim: Features of a head, which turn in pairs.
        device: Where the table shall be.
        dtype: float32, or float64 for functions that compute in float64.

    Returns:
        (2, T, head_dim / 2).

    Raises:
        ValueError: `head_dim` is odd.
    """
    if head_dim % 2:
        raise ValueError(
            f"`head_dim` (={head_dim}) must be even, since rotary positions turn features in pairs; pass another `dim` "
            f"or `num_heads`, such that a head has {head_dim + 1} features for instance."
        )
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim
    angles = torch.outer(torch.arange(length, device=device, dtype=dtype), _LONGEST_WAVE**-exponents)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn feature `i` of each position together with feature `i + head_dim / 2`.

    Args:
        x: Queries or keys, (B, H, T, head_dim).
        table: What `rotary_table` made for T positions.

    Returns:
        The turned ones, in the shape and dtype of `x`.

    Raises:
        ValueError: `table` was made for another length or head.
    """
    if table.shape[1:] != (x.shape[-2], x.shape[-1] // 2):
        raise ValueError(
            f"`rotary` has shape {tuple(table.shape)}, but must have (2, {x.shape[-2]}, {x.shape[-1] // 2}); make it "
            f"with `rotary_table({x.shape[-2]}, {x.shape[-1]})`."
        )
    cos, sin = table
    x1, x2 = x.chunk(2, dim=-1)
    # Under autocast `x` has a lower precision than the angles.
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
