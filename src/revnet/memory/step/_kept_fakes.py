"""Find tensors of a prediction that outlive it, outside of the model."""

import gc
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from revnet._torch_internals import FakeTensor, active_fake_mode


class KeptFakes:
    """The memory of the tensors of a prediction, of which nothing may be left when it ends.

    `Snapshot` restores everything that the model refers to. Code may also keep a tensor elsewhere: in a global
    variable, in a closure, or in a function with `functools.lru_cache`.
    """

    def __init__(self) -> None:
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """Watch these storages, without keeping them alive."""
        self._storages.update((storage._cdata, weakref.ref(storage)) for storage in storages)

    def warn(self, name: str) -> None:
        """Warn if a storage is still alive. `name` is the class of the model."""
        if not self._are_alive():
            return
        gc.collect()  # Cycles of objects, which keep nothing.
        if not self._are_alive():
            return
        # `isinstance` would call properties of unrelated objects.
        fakes = (value for value in gc.get_objects() if issubclass(type(value), FakeTensor))
        kept = next((fake for fake in fakes if self._is_alive(fake.untyped_storage()._cdata)), None)
        shape = "" if kept is None else f" of shape {tuple(kept.shape)}"
        warnings.warn(
            f"the code of `model` (={name}) keeps a tensor{shape}, which a prediction made without values, outside of "
            "the model, as in a global variable or an `lru_cache`. A model that uses it does not train: clear it now "
            "(`cache_clear()`), and make such tensors buffers (`register_buffer`), or run the model once before you "
            "predict.",
            stacklevel=2,
        )

    def _are_alive(self) -> bool:
        return any(map(self._is_alive, self._storages))

    def _is_alive(self, address: int) -> bool:
        return address in self._storages and self._storages[address]() is not None


@contextmanager
def checking_for_kept(model: nn.Module) -> Iterator[KeptFakes]:
    """Warn if anything keeps a fake tensor after the context. Not after an exception, whose traceback keeps them."""
    kept = KeptFakes()
    outer_mode = active_fake_mode()
    yield kept
    if outer_mode is None:  # Under a fake mode of the user, they may be wanted.
        kept.warn(type(model).__name__)
