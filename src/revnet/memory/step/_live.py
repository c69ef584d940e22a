"""Count live bytes as storages are created and freed."""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Count the live bytes of all tensor storages that are created while this mode is active.

    A storage counts from the operation that returns it until it is freed. It counts once, even if several tensors view
    it. Workspaces, which a kernel allocates and frees within one operation, are not seen.

    Args:
        ignore: Tensors whose storages do not count, such as parameters and inputs.
    """

    def __init__(self, ignore: Iterable[Tensor] = ()):
        super().__init__()
        # Kept alive, so that no new storage can get the address of an ignored one.
        self._ignored = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in ignore)}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._sizes: dict[int, int] = {}
        self.live_bytes = 0
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and watch the storages that it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self._watch(leaf.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._ignored:
            return
        if key not in self._watched:
            self._watched[key] = weakref.ref(storage, partial(self._freed, key))
            self._sizes[key] = 0
        self.live_bytes += size - self._sizes[key]  # An operation may have given it more memory.
        self._sizes[key] = size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _freed(self, key: int, _: Any) -> None:
        self.live_bytes -= self._sizes.pop(key)
        del self._watched[key]
