"""Inputs of other sizes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a meta tensor of another shape, which has the same memory format and requires a gradient if `tensor` does.

    Tensors with another layout than strided ones are returned as they are.
    """
    if tensor.layout is not torch.strided:
        return tensor
    strides = tensor.stride()
    if tuple(shape[1:]) == tuple(tensor.shape[1:]) and _holds_whole_samples(tensor):
        # Gaps between samples, or samples that share their memory, remain.
        y = torch.empty_strided(tuple(shape), strides, dtype=tensor.dtype, device="meta")
    else:
        order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
        y = torch.empty_permuted(tuple(shape), order, dtype=tensor.dtype, device="meta")
    return y.requires_grad_(tensor.requires_grad)


def _holds_whole_samples(tensor: Tensor) -> bool:
    """Return whether one sample follows another in memory, or all are the same memory."""
    sizes, strides = tensor.shape[1:], tensor.stride()
    reach = sum((size - 1) * stride for size, stride in zip(sizes, strides[1:], strict=True))
    return strides[0] == 0 or strides[0] > reach
