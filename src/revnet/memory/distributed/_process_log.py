"""Record the storages and collectives of one process of a distributed step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revnet._torch_internals import TorchDispatchMode, is_traceable_wrapper_subclass_type, tree_leaves
from revnet.memory.step._storage_reference import StorageReference

_KINDS = {
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "broadcast": "broadcast",
}
"""Kinds of collectives, by a part of the operation's name without underscores."""
_NAMESPACES = ("c10d", "_c10d_functional")


@dataclass(frozen=True)
class CollectiveCall:
    """One call of a collective."""

    kind: str
    row: int
    num_bytes: int
    """Size of the whole tensor: the output of an all-gather, the input of a reduce-scatter."""


class ProcessLog(TorchDispatchMode):
    """Record how the storages of a process on the CPU grow and shrink, and the collectives that it calls.

    `Recorder` reads the size of a storage once. `fully_shard` allocates and frees gathered parameters by resizing their
    storages, which is not an operation. So this log reads sizes again, before and after each operation: the sizes of
    the storages that the operation uses, and of the resized storages that are not empty. A storage that is resized for
    the first time is found at the next mark, so run one step before the one that counts.

    Changes belong to *rows*, numbered from 0. Each operation has a row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_rows = 0
        self.changes: list[tuple[int, int, int]] = []
        """Row, storage and difference in bytes of each change, in order."""
        self.collectives: list[CollectiveCall] = []
        self.transferred: set[int] = set()
        """Storages that a collective read or wrote, and storages that were resized: gathered parameters."""
        self._alive: dict[int, StorageReference] = {}
        self._sizes: list[int] = []
        self._is_paused = False
        self._gathered: dict[int, StorageReference] = {}
        """The resized storages that are not empty."""

    def index_of(self, tensor: Tensor) -> int:
        """Return the number of the storage of a tensor, or of the local part of a DTensor."""
        local: Tensor = getattr(tensor, "_local_tensor", tensor)
        return self._read(local.untyped_storage()).index

    def note_message(self, tensor: Tensor) -> None:
        """Note that a tensor is sent or received."""
        self.transferred.add(self.index_of(tensor))

    def alive(self) -> list[torch.UntypedStorage]:
        """Return the storages of fake tensors that are still alive."""
        storages = [reference() for reference in self._alive.values()]
        return [storage for storage in storages if storage is not None and storage.device.type == "meta"]

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count no storages of the operations inside, until other operations use them."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def mark(self) -> int:
        """End the current row, read the sizes of all storages, and return the number of the next row."""
        for reference in list(self._alive.values()):
            self._read_again(reference)
        self.num_rows += 1
        return self.num_rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record the changes before and after it."""
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # An operation on DTensors. They repeat it on their local tensors.
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        num_changes = len(self.changes)
        self._read_gathered()
        operands = _tensors_in((args, kwargs))
        for tensor in operands:
            self._read(tensor.untyped_storage())
        if len(self.changes) > num_changes:
            self.num_rows += 1
        result = func(*args, **kwargs)
        results = _tensors_in(result)
        for tensor in (*operands, *results):
            self._read(tensor.untyped_storage())
        self._read_gathered()
        if func.namespace in _NAMESPACES:
            self._note_collective(func.overloadpacket.__name__, [*args, *kwargs.values(), result])
        self.num_rows += 1
        return result

    def _note_collective(self, name: str, values: list[Any]) -> None:
        kind = next((kind for part, kind in _KINDS.items() if part in name.replace("_", "")), None)
        if kind is not None:
            num_bytes = max(sum(tensor.nbytes for tensor in _tensors_in(value)) for value in values)
            self.collectives.append(CollectiveCall(kind, self.num_rows, num_bytes))
        for tensor in _tensors_in(values):
            self.transferred.add(self._read(tensor.untyped_storage()).index)

    def _read_gathered(self) -> None:
        for reference in list(self._gathered.values()):
            self._read_again(reference)

    def _read(self, storage: torch.UntypedStorage) -> StorageReference:
        known = self._alive.get(storage._cdata)
        if known is not None and known() is not None:
            self._read_again(known)
            return known
        reference = StorageReference(storage, self._freed)
        self._alive[storage._cdata] = reference
        reference.key, reference.index = storage._cdata, len(self._sizes)
        self._sizes.append(storage.nbytes())
        self._change(reference.index, storage.nbytes())
        return reference

    def _read_again(self, reference: StorageReference) -> None:
        storage = reference()
        if storage is None or (size := storage.nbytes()) == self._sizes[reference.index]:
            return
        self._change(reference.index, size - self._sizes[reference.index])
        self._sizes[reference.index] = size
        self.transferred.add(reference.index)
        if size:
            self._gathered[reference.key] = reference
        else:
            self._gathered.pop(reference.key, None)

    def _freed(self, reference: Any) -> None:
        self._change(reference.index, -self._sizes[reference.index])
        # A thread of the process group may free a storage while a new one already has its address.
        key = reference.key
        for references in (self._alive, self._gathered):
            if references.get(key) is reference:
                del references[key]

    def _change(self, index: int, difference: int) -> None:
        if difference:
            self.changes.append((self.num_rows, index, difference))


def _tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in a nested structure whose storages count: dense ones, not on the meta device."""
    return [
        leaf
        for leaf in tree_leaves(values)
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided and leaf.device.type != "meta"
    ]
