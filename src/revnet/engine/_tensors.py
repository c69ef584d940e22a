"""Whose memory it is: which tensors share it, whether it was written to, whether anybody else can see it."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves


def storage_key(tensor: Tensor) -> int | None:
    """What all views of the same memory share, on every device (a `data_ptr` is 0 for fake and for empty tensors)."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # Sparse tensors and the like have no storage.
        return None


def version_of(tensor: Tensor) -> int:
    """The version counter that in-place operations raise; inference tensors have none."""
    try:
        return tensor._version
    except RuntimeError:  # Asking first would cost more, and this runs for every tensor.
        return 0


def has_values(tensor: Tensor) -> bool:
    """Whether the tensor is more than a shape: not fake, not on the meta device, not inside a transform."""
    return type(tensor) is Tensor and not tensor.is_meta and not torch._C._are_functorch_transforms_active()


def largest_element(x: Tensor) -> Tensor:
    """The magnitude of the largest element of a real tensor; NaN if there is one, 0 if there is nothing."""
    x = x.detach()
    if x.numel() == 0:
        return x.new_zeros(())
    # The norm that says it takes thirty times as long on a CPU; and of these, each is slow where the other is not.
    is_dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    least, most = (x.amin(), x.amax()) if is_dense else torch.aminmax(x)
    return torch.maximum(most, -least)


def _use_count(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _count_alone() -> int | None:
    """What `_use_count` says of a tensor that nothing shares; None where it cannot tell, in some release of PyTorch."""
    if not hasattr(torch._C, "_storage_Use_Count"):
        return None
    tensor = torch.empty(1, device="cpu")
    alone = _use_count(tensor)
    view = tensor.detach()
    return alone if _use_count(view) == alone + 1 else None


_ALONE = _count_alone()
_PLAIN = (Tensor, FakeTensor)  # A fake tensor is counted as the one that it stands for.


def is_plain(tensor: Tensor) -> bool:
    """Whether it is an ordinary tensor, or a fake one that stands for such."""
    return type(tensor) in _PLAIN


def is_only_owner(tensor: Tensor) -> bool:
    """Whether no other tensor sees this one's memory: not the user's, not a slot's, not one that autograd kept."""
    return _ALONE is not None and is_plain(tensor) and _use_count(tensor) == _ALONE


def tensors_in(*values: Any) -> list[Tensor]:
    """Return the tensors in the arguments of a call, however deep."""
    if not any(values):
        return []
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
