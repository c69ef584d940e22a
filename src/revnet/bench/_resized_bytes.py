"""Count the bytes of tensors whose storages may be resized."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ResizedBytes(TorchDispatchMode):
    """Count the bytes of all storages except `baseline`, reading every storage's size at every operation.

    `LiveBytes` reads the size of a storage once. This is fast, and exact as long as storages are only
    created and freed. memcnn frees its inputs by resizing their storages to zero, which a dispatch mode does not see,
    so this class reads the sizes again before and after each operation. A method that frees its own input gets credit
    for it: the count is the allocator's current total minus its total at the start.

    Args:
        ignore: Tensors that are never resized, such as parameters and buffers. They are not read, since there are many.
        baseline: Existing tensors that may be freed or resized, such as the input.
    """

    def __init__(self, ignore: Iterable[Tensor] = (), baseline: Iterable[Tensor] = ()):
        super().__init__()
        # Keep the ignored storages alive, so that no new storage gets the same address.
        self._ignored = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in ignore)}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in baseline:
            self._watch(tensor.untyped_storage())
        self._baseline_bytes = self._total_bytes()
        self.peak_bytes = 0

    @property
    def live_bytes(self) -> int:
        """Bytes alive now, less the baseline."""
        return self._total_bytes() - self._baseline_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and read all sizes before and after it."""
        self._note_peak()
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self._watch(leaf.untyped_storage())
        self._note_peak()
        return result

    def _note_peak(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _total_bytes(self) -> int:
        storages = [reference() for reference in self._watched.values()]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._watched and key not in self._ignored:
            self._watched[key] = weakref.ref(storage, lambda _: self._watched.pop(key, None))
