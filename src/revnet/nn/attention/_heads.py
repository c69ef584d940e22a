"""What the attentions share: checks of their arguments, and features divided into heads."""

import torch
from torch import Tensor


def check_heads(dim: int, num_heads: int) -> None:
    """Raise unless `num_heads` heads can share `dim` features."""
    for name, count in (("dim", dim), ("num_heads", num_heads)):
        check_count(name, count)
    if dim % num_heads:
        raise ValueError(
            f"`dim` (={dim}) must be a multiple of `num_heads` (={num_heads}), which share it; "
            f"pass {dim + num_heads - dim % num_heads}, or other heads."
        )


def check_count(name: str, count: int, *, least: int = 1) -> None:
    """Raise unless `count` is an integer of at least `least`."""
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise ValueError(
            f"`{name}` (={count!r}) must be {'a positive integer' if least == 1 else f'at least {least}'}."
        )


def check_sequence(x: Tensor, dim: int, mask: Tensor | None) -> None:
    """Raise unless `x` is (B, T, dim), and `mask` says of each token whether it is real."""
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ValueError(f"`x` has shape {tuple(x.shape)}, but must have (B, T, {dim}).")
    check_mask(mask, x.shape[:2])


def check_mask(mask: Tensor | None, shape: torch.Size) -> None:
    """Raise unless `mask` is None, or booleans of `shape`, (B, T)."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"`mask` (={kind}) must be a bool tensor, true where a token is real; pass `mask.bool()`.")
    if mask.shape != shape:
        raise ValueError(
            f"`mask` has shape {tuple(mask.shape)}, but must have that of the tokens, {tuple(shape)}: (B, T)."
        )


def split_heads(x: Tensor, num_parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(B, T, num_parts * D) into `num_parts` tensors of (B, num_heads, T, D / num_heads)."""
    B, T, width = x.shape
    return x.view(B, T, num_parts, num_heads, width // (num_parts * num_heads)).permute(2, 0, 3, 1, 4).unbind()


def join_heads(x: Tensor) -> Tensor:
    """(B, num_heads, T, D / num_heads) into (B, T, D)."""
    return x.transpose(1, 2).flatten(2)
