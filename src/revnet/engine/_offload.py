"""Keep activations in host memory between the forward and the backward pass."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revnet._types import Streams
from revnet.engine._chain import BoundChain, stored
from revnet.engine._tensors import storage_key, version_of
from revnet.engine._tracing import refuse, runs_plainly

Result = TypeVar("Result")


def offloaded(chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
    """Run the half-blocks with ordinary autograd, and keep the saved tensors in host memory.

    The arguments, results and errors are as for `stored`.
    """
    functions = [half_block.function for half_block in chain.half_blocks]
    return keeping_on_host(lambda: stored(chain, streams), functions, chain.tensors())


def offloaded_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module with ordinary autograd, and keep the saved tensors in host memory."""
    return keeping_on_host(lambda: module(*args, **kwargs), [module], [])


def keeping_on_host(compute: Callable[[], Result], modules: Sequence[nn.Module], arguments: Sequence[Tensor]) -> Result:
    """Run `compute`, and keep the tensors that autograd saves in host memory.

    This is like `torch.autograd.graph.save_on_cpu`, but parameters, buffers and arguments, which outlive the call, stay
    where they are, and a tensor that two operations save is copied only once.

    Args:
        compute: The computation.
        modules: The modules whose parameters and buffers stay.
        arguments: Other tensors that stay.
    """
    if not torch.is_grad_enabled() or runs_plainly():
        return compute()
    if torch.compiler.is_dynamo_compiling():
        refuse("activations cannot be kept on the host under `torch.compile`; use the policy `Reverse()` or `Store()`.")
    staying = [*arguments]
    for module in modules:
        staying += [*module.parameters(), *module.buffers()]
    # By memory, so that views such as `weight.t()` stay, too.
    keys = {storage_key(tensor) for tensor in staying}
    copies: dict[tuple[Any, ...], tuple[weakref.ref[Any], _OnHost]] = {}

    def pack(tensor: Tensor) -> _KeptInPlace | _OnHost:
        if storage_key(tensor) in keys or _is_on_host(tensor) or tensor.layout is not torch.strided:
            # Without its node, which would refer to the tensor that the node saved: a cycle that nothing frees.
            return _KeptInPlace(tensor if tensor.grad_fn is None else tensor.detach(), version_of(tensor))
        storage = tensor.untyped_storage()
        # Includes the version: a tensor that was written to between two operations has other values for the second one.
        key = (storage._cdata, version_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        known = copies.get(key)
        if known is not None and known[0]() is not None:  # Otherwise, another storage has its address.
            return known[1]
        packed = _OnHost.of(tensor)
        # Weak, because the purpose of the copy is to free the storage.
        copies[key] = (weakref.ref(storage), packed)
        return packed

    with saved_tensors_hooks(pack, _unpack):
        return compute()


@dataclass(frozen=True, slots=True, eq=False)
class _KeptInPlace:
    """A saved tensor that stays where it is, with autograd's check of the version."""

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


@dataclass(frozen=True, slots=True, eq=False)
class _OnHost:
    """Copy of a saved tensor in host memory."""

    copy: Tensor
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "_OnHost":
        # Pinned, so that copying back does not block the host.
        copy = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=torch.cuda.is_available()
        )
        return cls(copy.copy_(tensor), tensor.device)

    def unpack(self) -> Tensor:
        return self.copy.to(self.device, non_blocking=self.copy.is_pinned())


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _unpack(packed: _KeptInPlace | _OnHost) -> Tensor:
    return packed.unpack()
