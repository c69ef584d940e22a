"""Whose memory it is: which tensors share it, whether it was written to, whether anybody else can see it."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from revnet._torch_internals import FakeTensor, in_functorch_transform, storage_use_count

_version = attrgetter("_version")


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


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """Return the version counters of several tensors."""
    try:
        return list(map(_version, tensors))
    except RuntimeError:
        return list(map(version_of, tensors))


def has_values(tensor: Tensor) -> bool:
    """Whether the tensor is more than a shape: not fake, not on the meta device, not inside a transform."""
    return type(tensor) is Tensor and not tensor.is_meta and not in_functorch_transform()


def largest_element(x: Tensor) -> Tensor:
    """The magnitude of the largest element of a real tensor; NaN if there is one, 0 if there is nothing."""
    x = x.detach()
    if x.numel() == 0:
        return x.new_zeros(())
    if x.numel() <= 2**12:
        return torch.linalg.vector_norm(x, torch.inf)  # One operation instead of three.
    # The norm that says it takes thirty times as long on a CPU; and of these, each is slow where the other is not.
    is_dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    least, most = (x.amin(), x.amax()) if is_dense else torch.aminmax(x)
    return torch.maximum(most, -least)


def _count_alone() -> int | None:
    """Return the use count of a storage that nothing shares; None where PyTorch does not say."""
    if storage_use_count is None:
        return None
    tensor = torch.empty(1, device="cpu")
    # Found rather than known: to ask counts, too. Unless a view adds one, the count says something else.
    alone = storage_use_count(tensor.untyped_storage()._cdata)
    view = tensor.detach()
    return alone if storage_use_count(view.untyped_storage()._cdata) == alone + 1 else None


ALONE = _count_alone()
use_count: Any = storage_use_count
PLAIN = (Tensor, FakeTensor)  # A fake tensor is counted as the one that it stands for.


def is_plain(tensor: Tensor) -> bool:
    """Return whether it is an ordinary tensor, or a fake one that stands for such."""
    return type(tensor) in PLAIN


def is_only_owner(tensor: Tensor) -> bool:
    """Return whether no other tensor sees this one's memory: not the user's, not a slot's, not one of autograd."""
    if storage_use_count is None or type(tensor) not in PLAIN:
        return False
    return storage_use_count(tensor.untyped_storage()._cdata) == ALONE


def tensors_in(*values: Any) -> list[Tensor]:
    """Return the tensors in the arguments of a call, however deep."""
    if not any(values):  # Usually so, and `tree_leaves` is slow.
        return []
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
