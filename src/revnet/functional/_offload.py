"""Keeping activations in host memory between the forward and the backward pass."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revnet.engine.compile import runs_plainly
from revnet.functional._recompute import tensors_in
from revnet.functional._storage import storage_key, version_of

Result = TypeVar("Result")


def offloaded(compute: Callable[[], Result], modules: Sequence[nn.Module], args: Any, kwargs: dict[str, Any]) -> Result:
    """Run `compute`, and keep on the host what autograd saves of it.

    As `torch.autograd.graph.save_on_cpu` does, but parameters, buffers and arguments, which outlive the call, stay
    where they are, and a tensor that two operations save is copied once.

    Args:
        compute: What to run.
        modules: The modules whose parameters and buffers stay.
        args: The positional arguments that stay.
        kwargs: The keyword arguments that stay.
    """
    if not torch.is_grad_enabled() or runs_plainly():
        return compute()
    if torch.compiler.is_dynamo_compiling():
        raise NotImplementedError(
            "activations cannot be kept on the host under `torch.compile`; use the policy `Reverse()` or `Store()`."
        )
    staying = [*tensors_in(args, kwargs)]
    for module in modules:
        staying += [*module.parameters(), *module.buffers()]
    keys = {storage_key(tensor) for tensor in staying}
    copies: dict[tuple[Any, ...], tuple[weakref.ref[Any], _OnHost]] = {}

    def pack(tensor: Tensor) -> _Here | _OnHost:
        if storage_key(tensor) in keys or _is_on_host(tensor) or tensor.layout is not torch.strided:
            return _Here(tensor, version_of(tensor))
        storage = tensor.untyped_storage()
        key = (storage._cdata, version_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        known = copies.get(key)
        if known is not None and known[0]() is not None:  # Else another storage has taken its place.
            return known[1]
        packed = _OnHost.of(tensor)
        copies[key] = (weakref.ref(storage), packed)
        return packed

    with saved_tensors_hooks(pack, _unpack):
        return compute()


class _Here(NamedTuple):
    """A saved tensor that stays where it is, guarded as autograd would guard it."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        if version_of(self.tensor) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {tuple(self.tensor.shape)} is at version {version_of(self.tensor)}; expected version "
                f"{self.version} instead."
            )
        return self.tensor


class _OnHost(NamedTuple):
    """A saved tensor's copy on the host."""

    copy: Tensor
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "_OnHost":
        copy = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=torch.cuda.is_available()
        )
        return cls(copy.copy_(tensor), tensor.device)

    def unpack(self) -> Tensor:
        return self.copy.to(self.device, non_blocking=self.copy.is_pinned())


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _unpack(packed: _Here | _OnHost) -> Tensor:
    return packed.unpack()
