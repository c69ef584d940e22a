"""Record when storages are created, when they are freed, and how large they are."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from revnet.memory.step._storage_reference import StorageReference


class StorageWatch:
    """The storages of a step, numbered in the order in which they are created. It keeps none of them alive.

    Args:
        ignore: Tensors that are alive during the whole step, whose storages do not count.
        device_type: Type of the device on which storages count, such as "cpu"; storages elsewhere take no memory there.
        kept: Called at the end with the storages that are still alive.
    """

    def __init__(
        self,
        ignore: Iterable[Tensor],
        device_type: str,
        kept: Callable[[list[torch.UntypedStorage]], None] | None = None,
    ):
        self._device_type = device_type
        # Kept alive, so that no new storage can get the address of an ignored one.
        self._ignored = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in ignore}
        self._kept = kept
        self._references: dict[int, StorageReference] = {}
        self.event = 0
        """Number of the current event."""
        self.births: list[int] = []
        self.deaths: dict[int, int] = {}
        self.sizes: list[int] = []
        self.creators: list[int] = []

    @property
    def notes_kept(self) -> bool:
        """Whether all storages that remain at the end matter, and not only their bytes."""
        return self._kept is not None

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Note tensors that may remain, and whose storages do not count."""
        if self._kept is not None:
            self._kept([tensor.untyped_storage() for tensor in tensors])

    def watch(self, tensor: Tensor, creator: int) -> int | None:
        """Count the storage of a tensor and return its number; None if it does not count or is known.

        If it has grown since, the old memory counts as freed once the new one has its contents.
        """
        if tensor.layout is not torch.strided:
            return None
        if tensor.device.type != self._device_type:
            self.note([tensor])
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ignored:
            return None
        known = self._references.get(key)
        if known is not None:
            if storage.nbytes() <= self.sizes[known.index]:
                return None
            self.deaths[known.index] = self.event + 1
        index = len(self.births)
        reference = self._references[key] = StorageReference(storage, self._freed)
        reference.key, reference.index = key, index
        self.births.append(self.event)
        self.sizes.append(storage.nbytes())
        self.creators.append(creator)
        return index

    def index_of(self, tensor: Tensor) -> int | None:
        """Return the number of the storage of a tensor; None if it is not counted."""
        reference = self._references.get(tensor.untyped_storage()._cdata)
        return None if reference is None else reference.index

    def close(self) -> None:
        """Stop watching and release all memory."""
        if self._kept is not None:
            self._kept([storage for reference in self._references.values() if (storage := reference()) is not None])
        self._references.clear()
        self._ignored.clear()

    def _freed(self, reference: Any) -> None:
        self.deaths[reference.index] = self.event
        del self._references[reference.key]
