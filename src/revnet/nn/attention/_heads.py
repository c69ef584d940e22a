"""Functions that all attention layers share: checks of arguments, and splitting features into heads."""

from torch import Tensor

from revnet._checks import MOST_CHANNELS, check_count, check_mask, check_tensor


def check_heads(dim: int, num_heads: int) -> None:
    """Raise unless `num_heads` heads can share `dim` features."""
    check_count("dim", dim, most=MOST_CHANNELS)
    check_count("num_heads", num_heads, most=MOST_CHANNELS)
    if dim % num_heads:
        raise ValueError(
            f"`dim` (={dim}) must be a multiple of `num_heads` (={num_heads}), which share it; "
            f"pass {dim + num_heads - dim % num_heads}, or another number of heads."
        )


def check_sequence(x: Tensor, dim: int, num_heads: int, mask: Tensor | None, rotary: Tensor | None) -> None:
    """Raise unless `x` is (B, T, dim), and `mask` and `rotary` are None or fit `x`."""
    if not isinstance(x, Tensor):
        check_tensor("x", x)
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ValueError(f"`x` has shape {tuple(x.shape)}, but must have (B, T, {dim}).")
    check_mask(mask, x.shape[:2], takes_documents=True)
    if rotary is None:
        return
    check_tensor("rotary", rotary, hint="make it with `rotary_table`")
    shape = (2, x.shape[1], dim // num_heads // 2)
    if rotary.shape != shape:
        raise ValueError(
            f"`rotary` has shape {tuple(rotary.shape)}, but must have {shape}; make it with "
            f"`rotary_table({shape[1]}, {dim // num_heads})`."
        )


def split_heads(x: Tensor, num_parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """Split (B, T, num_parts * D) into `num_parts` tensors of (B, num_heads, T, D / num_heads)."""
    B, T, width = x.shape
    return x.view(B, T, num_parts, num_heads, width // (num_parts * num_heads)).permute(2, 0, 3, 1, 4).unbind()


def join_heads(x: Tensor) -> Tensor:
    """Join (B, num_heads, T, D / num_heads) into (B, T, D)."""
    return x.transpose(1, 2).flatten(2)
