"""Memory of tensors: which tensors share it, whether it was written to, and whether anything else can see it."""

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from revnet._torch_internals import FakeTensor, in_functorch_transform, storage_use_count

# Implemented in C, because every call uses them.
get_version = attrgetter("_version")
get_requires_grad = attrgetter("requires_grad")
flatten = chain.from_iterable


def storage_key(tensor: Tensor) -> int | None:
    """Return a key that all views of the same memory share, on every device; None without a storage.

    A `data_ptr` does not serve, because it is 0 for fake and for empty tensors.
    """
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # Sparse tensors and some others have no storage.
        return None


def version_of(tensor: Tensor) -> int:
    """Return the version counter, which in-place operations raise; 0 for inference tensors, which have none."""
    try:
        return tensor._version
    except RuntimeError:  # Checking first would cost more, and this runs for every tensor.
        return 0


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """Return the version counters of several tensors."""
    try:
        return list(map(get_version, tensors))
    except RuntimeError:
        return list(map(version_of, tensors))


def has_values(tensor: Tensor) -> bool:
    """Return whether the tensor has values: it is not fake, not on the meta device, and not inside a transform."""
    return type(tensor) is Tensor and not tensor.is_meta and not in_functorch_transform()


def is_sharded(parameter: Tensor | None) -> bool:
    """Return whether FSDP divides the parameter among processes. Importing its class would take time."""
    return hasattr(parameter, "device_mesh")


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill their memory without gaps, in any order of the dimensions."""
    return in_memory_order(tensor).is_contiguous()


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return a view with the dimensions in the order in which they lie in memory."""
    strides, shape = tensor.stride(), tensor.shape
    return tensor.permute(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], -shape[dim])))


def largest_element(x: Tensor) -> Tensor:
    """Return the largest magnitude in a real tensor; NaN if it contains one, 0 if it is empty."""
    x = x.detach()
    if x.numel() == 0:
        return x.new_zeros(())
    if x.numel() <= 2**12:
        return torch.linalg.vector_norm(x, torch.inf)  # One operation instead of three.
    # `vector_norm` takes 30 times as long on a CPU. `amin` and `amax` are fast on dense tensors, `aminmax` on strided
    # ones.
    is_usual = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    least, most = (x.amin(), x.amax()) if is_usual else torch.aminmax(x)
    return torch.maximum(most, -least)


def _count_alone() -> int | None:
    """Return the use count of a storage that nothing shares; None if PyTorch does not report it."""
    if storage_use_count is None:
        return None
    tensor = torch.empty(1, device="cpu")
    # Measured, since the query counts, too. Usable only if a view adds one.
    alone = storage_use_count(tensor.untyped_storage()._cdata)
    view = tensor.detach()
    return alone if storage_use_count(view.untyped_storage()._cdata) == alone + 1 else None


ALONE = _count_alone()
use_count: Any = storage_use_count
PLAIN = (Tensor, FakeTensor)  # A fake tensor is counted like the tensor that it represents.


def is_plain(tensor: Tensor) -> bool:
    """Return whether `tensor` is an ordinary tensor, or a fake tensor that represents one."""
    return type(tensor) in PLAIN


def is_only_owner(tensor: Tensor) -> bool:
    """Return whether no other tensor sees this tensor's memory: not the user's, a slot's, or autograd's."""
    if storage_use_count is None or type(tensor) not in PLAIN:
        return False
    return storage_use_count(tensor.untyped_storage()._cdata) == ALONE


def tensors_in(*values: Any) -> list[Tensor]:
    """Return the tensors in the arguments of a call, at any depth."""
    if not any(values):  # Usually empty, and `tree_leaves` is slow.
        return []
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
