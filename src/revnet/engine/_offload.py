"""Keep activations in host memory between the forward and the backward pass."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from revnet._torch_internals import (
    HAS_ACCELERATOR,
    has_internal_overlap,
    in_functorch_transform,
    next_sequence_number,
    pop_saved_tensors_hooks,
    push_saved_tensors_hooks,
)
from revnet._types import Streams
from revnet.engine import _careful
from revnet.engine._capture import is_capturing
from revnet.engine._chain import BoundChain, stored
from revnet.engine._copy_stream import transfers_for
from revnet.engine._tensors import storage_key, version_of
from revnet.engine._tracing import refuse, runs_plainly
from revnet.engine._transfers import PackedOnHost, overwritten_before_copy, span_of

Result = TypeVar("Result")


def offloaded(chain: BoundChain, streams: Sequence[Tensor], *, overlaps: bool = False) -> Streams:
    """Run the half-blocks with ordinary autograd, and keep the saved tensors in host memory.

    The other arguments, the results and the errors are as for `stored`.

    Args:
        chain: The half-blocks in order, with the arguments of their functions.
        streams: The streams, two or more. Not modified.
        overlaps: Whether a GPU computes during the copies; see `_transfers`.
    """
    functions = [half_block.function for half_block in chain.half_blocks]
    return keeping_on_host(lambda: stored(chain, streams), functions, chain.tensors(), overlaps=overlaps)


def offloaded_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, overlaps: bool = False) -> Any:
    """Call a module with ordinary autograd, and keep the saved tensors in host memory."""
    return keeping_on_host(lambda: module(*args, **kwargs), [module], [], overlaps=overlaps)


def keeping_on_host(
    compute: Callable[[], Result],
    modules: Sequence[nn.Module],
    arguments: Sequence[Tensor],
    *,
    overlaps: bool = False,
) -> Result:
    """Run `compute`, and keep the tensors that autograd saves in host memory.

    This is like `torch.autograd.graph.save_on_cpu`, but parameters, buffers and arguments, which outlive the call, stay
    where they are, and a tensor that two operations save is copied only once.

    Args:
        compute: The computation.
        modules: The modules whose parameters and buffers stay.
        arguments: Other tensors that stay.
        overlaps: Whether a GPU computes during the copies.

    Raises:
        NotImplementedError: The call is traced by `torch.compile`, or captured in a CUDA graph.
        RuntimeError: A transform of `torch.func`, around the call or in it, forbids saved-tensor hooks.
    """
    if not torch.is_grad_enabled() or runs_plainly():
        return compute()
    if torch.compiler.is_dynamo_compiling():
        refuse("activations cannot be kept on the host under `torch.compile`; use the policy `Reverse()` or `Store()`.")
    if HAS_ACCELERATOR and is_capturing():
        raise NotImplementedError(
            "activations cannot be kept on the host while a CUDA graph is captured; use the policy `Reverse()`, "
            "`Checkpoint()` or `Store()`."
        )
    staying = [*arguments]
    for module in modules:
        staying += [*module.parameters(), *module.buffers()]
    # By memory, so that views such as `weight.t()` stay, too.
    keys = {storage_key(tensor) for tensor in staying}
    copies: dict[tuple[Any, ...], tuple[weakref.ref[Any], _OnHost | PackedOnHost]] = {}
    waiting: list[_OnHost | PackedOnHost] = []
    number = 0

    def begin() -> None:
        for packed in waiting:
            packed.begin()
        waiting.clear()

    def pack(tensor: Tensor) -> _KeptInPlace | _OnHost | PackedOnHost:
        nonlocal number
        # Copied when the next operation saves something: some operations save memory that they are about to fill, such
        # as the noise of RReLU.
        if waiting and next_sequence_number() != number:
            begin()
        stays = storage_key(tensor) in keys or _is_parameter(tensor) or _is_on_host(tensor)
        if stays or tensor.layout is not torch.strided:
            # Without its node, which would refer to the tensor that the node saved: a cycle that nothing frees.
            return _KeptInPlace(tensor if tensor.grad_fn is None else tensor.detach(), version_of(tensor))
        storage = tensor.untyped_storage()
        # Includes the version: a tensor that was written to between two operations has other values for the second one.
        layout = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        key = (storage._cdata, version_of(tensor), *layout, tensor.is_conj(), tensor.is_neg())
        known = copies.get(key)
        if known is not None and known[0]() is not None:  # Otherwise, another storage has its address.
            return known[1]
        # Another device, and a tensor of another class, may have no memory that can be copied as bytes.
        is_plain = overlaps and _is_on_gpu(tensor) and type(tensor) in (Tensor, nn.Parameter)
        is_plain = is_plain and not (tensor.is_conj() or tensor.is_neg() or in_functorch_transform())
        packed = transfers_for(tensor.device).store(tensor) if is_plain else _OnHost(tensor)
        waiting.append(packed)
        number = next_sequence_number()
        # Weak, because the purpose of the copy is to free the storage.
        copies[key] = (weakref.ref(storage), packed)
        return packed

    try:
        with _packing(pack):
            return compute()
    finally:
        begin()


@contextmanager
def _packing(pack: Callable[[Tensor], Any]) -> Iterator[None]:
    """Let `pack` save tensors, and explain errors of transforms that forbid such hooks."""
    try:
        push_saved_tensors_hooks(pack, _unpack)
    except RuntimeError as error:
        raise _careful.no_hooks(error) from error
    try:
        yield
    except RuntimeError as error:
        if "yet support saved tensor hooks" not in str(error):
            raise
        raise RuntimeError(
            "a module whose activations are kept on the host uses `torch.func.grad`, `vjp`, `jacrev` or `vmap` of "
            "them, which forbid the saved-tensor hooks that copy activations; use `torch.autograd.grad` with "
            "`create_graph=True` in the module, or store the activations with `set_policy(model, Store())`."
        ) from error
    finally:
        pop_saved_tensors_hooks()


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


class _OnHost:
    """A saved tensor that is copied to host memory."""

    __slots__ = ("_copy", "_device", "_shape", "_source", "_version")

    def __init__(self, tensor: Tensor):
        self._source: Tensor | None = tensor.detach()
        self._shape, self._device, self._version = tensor.shape, tensor.device, version_of(tensor)
        self._copy: Tensor | None = None

    def begin(self) -> None:
        """Copy the tensor to the host, once the operation that saved it has run."""
        source = self._source
        if source is None or source.untyped_storage().nbytes() < span_of(source):
            return  # FSDP has freed a parameter's memory, and brings it back for the backward pass.
        self._source = None
        if version_of(source) == self._version:
            # Once for each element in memory: an expanded tensor cannot be written to.
            shape = [1 if stride == 0 else size for size, stride in zip(source.shape, source.stride(), strict=True)]
            source = source.as_strided(shape, source.stride()) if has_internal_overlap(source) else source
            source = source.contiguous() if has_internal_overlap(source) else source
            # Pinned, so that copying back does not block the host.
            copy = torch.empty_strided(
                source.shape, source.stride(), dtype=source.dtype, pin_memory=_can_pin(source.device)
            )
            self._copy = copy.copy_(source)

    def unpack(self) -> Tensor:
        self.begin()
        if self._copy is None:
            raise overwritten_before_copy(self._shape)
        tensor = self._copy.to(self._device, non_blocking=self._copy.is_pinned())
        return tensor if tensor.shape == self._shape else tensor.expand(self._shape)


def _can_pin(device: torch.device) -> bool:
    """Return whether copies between the host and `device` are faster from pinned memory."""
    return device.type in ("cuda", "xpu") and torch.accelerator.is_available()


def _is_parameter(tensor: Tensor) -> bool:
    """Return whether a tensor is a parameter or a view of one: with FSDP, one that is gathered only during the call."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _unpack(packed: _KeptInPlace | _OnHost | PackedOnHost) -> Tensor:
    return packed.unpack()
