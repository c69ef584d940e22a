"""The dimension along which a block splits a tensor."""

from torch import Tensor, nn

from revnet._checks import describe, is_integer


def choose_split_dim(split_dim: int | None) -> tuple[int, bool]:
    """Return the dimension to split, and whether it is the default.

    Raises:
        TypeError: `split_dim` is neither an integer nor None.
    """
    if split_dim is None:
        return 1, True
    if not is_integer(split_dim):
        raise TypeError(
            f"`split_dim` (={describe(split_dim)}) must be an integer, the dimension of the input to split: 1 for the "
            "channels of images, -1 for the features of sequences."
        )
    return split_dim, False


def unclear_split_dim(kind: type[nn.Module], x: Tensor) -> ValueError:
    """Return the error for a three-dimensional tensor that a block would split along the default dimension.

    Such a tensor is (B, C, L) or (B, T, D). Dimension 1 of the latter holds the tokens: splitting them runs without an
    error, but mixes tokens instead of features, and a causal model would see the future.
    """
    return ValueError(
        f"`split_dim` must be passed to {kind.__name__} for a three-dimensional input (shape "
        f"{tuple(x.shape)}); pass `split_dim=-1` for (B, T, D), or `split_dim=1` for (B, C, L)."
    )
