"""Rotary positions: queries and keys are rotated by an angle proportional to their position.

The product of a rotated query and a rotated key depends on the positions only through their difference.

References:
    Su et al. (2021), RoFormer: Enhanced Transformer with Rotary Position Embedding, section 3.2.
"""

from typing import Any

import torch
from torch import Tensor

from revnet._checks import MOST_CHANNELS, check_count, check_per_head, check_positive_number, check_tensor, describe
from revnet._torch_internals import is_jit_tracing

_MOST_POSITIONS = 2**26
"""Largest number of positions. A larger table would take minutes."""


def rotary_table(
    length: int,
    head_dim: int,
    *,
    start: int = 0,
    base: float = 10_000.0,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the cosines and sines of the angles that `rotate` uses. One table serves all layers.

    Args:
        length: Number of positions, T.
        head_dim: Features of a head, which are rotated in pairs.
        start: First position.
        base: Base of the frequencies, `rope_theta` in LLaMA. The longest wave has about `2 pi base` positions.
        device: Device of the table.
        dtype: Data type of the table: float32, or float64 for functions that compute in float64. A table in lower
            precision is a rounded one in float32.

    Returns:
        A tensor of shape (2, T, head_dim / 2).

    Raises:
        TypeError: `device` is not a device, or `dtype` is not floating-point.
        ValueError: `length` or `head_dim` is not a positive integer, `head_dim` is odd, `start` is negative, or `base`
            is not a positive number.
    """
    # A compiled graph may serve any length, so a check must not specialize it; a traced length is a tensor.
    if not torch.compiler.is_compiling() and not is_jit_tracing():
        check_count("length", length, most=_MOST_POSITIONS)
        check_count("start", start, least=0, most=_MOST_POSITIONS)
    check_head_dim(head_dim)
    check_positive_number("base", base, hint="10,000 is usual")
    if device is not None and not isinstance(device, torch.device):
        raise TypeError(f"`device` (={describe(device)}) must be a `torch.device`, such as `x.device`, or None.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"`dtype` (={describe(dtype)}) must be a floating-point dtype, such as `torch.float32`.")
    # Lower precision cannot hold the positions: 257 is 256 in bfloat16.
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    positions = torch.arange(start, start + length, device=device, dtype=precise)
    return table_of(positions, head_dim, base).to(dtype)


def check_head_dim(head_dim: Any) -> None:
    """Raise unless `head_dim` is a number of features that can be rotated in pairs."""
    check_count("head_dim", head_dim, most=MOST_CHANNELS)
    if head_dim % 2:
        raise ValueError(
            f"`head_dim` (={head_dim}) must be even, since rotary positions rotate pairs of features; change `dim` "
            f"or `num_heads`, for instance to give a head {head_dim + 1} features."
        )


def table_of(positions: Tensor, head_dim: int, base: float) -> Tensor:
    """Return the cosines and sines of the angles at some positions.

    Args:
        positions: Positions in the dtype of the table, (T,), or (B, 1, T) if they differ between rows.
        head_dim: Features of a head.
        base: Base of the frequencies.

    Returns:
        A tensor of shape (2, T, head_dim / 2) or (2, B, 1, T, head_dim / 2).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=positions.dtype) / head_dim
    frequencies = float(base) ** -exponents
    angles = torch.outer(positions, frequencies) if positions.dim() == 1 else positions[..., None] * frequencies
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate feature `i` of each position together with feature `i + head_dim / 2`.

    Args:
        x: Queries or keys, (B, H, T, head_dim).
        table: Output of `rotary_table` for T positions, (2, T, head_dim / 2), or a table for each row, (2, B, 1, T,
            head_dim / 2).

    Returns:
        The rotated queries or keys, with the shape and dtype of `x`.

    Raises:
        TypeError: An argument is not a tensor, or `x` is not floating-point.
        ValueError: `head_dim` is odd, or `table` is for another length or head size.
    """
    check_per_head(x=x)
    if torch.compiler.is_compiling() or not is_jit_tracing():  # A traced size is a tensor.
        check_head_dim(x.shape[-1])
    check_tensor("table", table, hint="make it with `rotary_table`")
    sizes = (x.shape[-2], x.shape[-1] // 2)
    if table.shape != (2, *sizes) and table.shape != (2, x.shape[0], 1, *sizes):
        raise ValueError(
            f"`table` has shape {tuple(table.shape)}, but must have (2, {x.shape[-2]}, {x.shape[-1] // 2}); make it "
            f"with `rotary_table({x.shape[-2]}, {x.shape[-1]})`."
        )
    cos, sin = table
    x1, x2 = x.chunk(2, dim=-1)
    # Under autocast `x` has lower precision than the angles.
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
