"""Weak references to storages."""

import weakref

import torch


class StorageReference(weakref.ref[torch.UntypedStorage]):
    """Weak reference that remembers which storage it referred to."""

    __slots__ = ("index", "key")
    index: int
    key: int
