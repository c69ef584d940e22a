"""The digest of the state in a checkpoint, which reveals a value that a checksum of bytes cannot know to be wrong."""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from torch import Tensor, uint8

DIGEST_KEY = "revnet_digest"
"""Key of the digest in a checkpoint."""
_LARGEST_HASHED = 1024
"""Elements up to which a tensor is hashed; the checksums of the file cover the larger ones."""


def digest_state(checkpoint: Mapping[str, Any]) -> str:
    """Return the digest of all numbers and names in a checkpoint, and of the shapes and types of its tensors."""
    digest = blake2b(digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            digest.update(b"{")
            for key, item in value.items():
                digest.update(f"{key!r}:".encode("utf-8", "backslashreplace"))
                add(item)
        elif isinstance(value, list | tuple):
            digest.update(b"[")
            for item in value:
                add(item)
        elif isinstance(value, set | frozenset):
            add(sorted(map(repr, value)))  # Their order depends on the process.
        elif isinstance(value, Tensor):
            digest.update(f"{value.dtype} {list(value.shape)}".encode())
            if value.numel() <= _LARGEST_HASHED:
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().data)
        else:
            digest.update(f"{value!r},".encode("utf-8", "backslashreplace"))

    add({key: value for key, value in checkpoint.items() if key != DIGEST_KEY})
    return digest.hexdigest()


def is_changed(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint is not the one that was saved; false if it has no digest."""
    return DIGEST_KEY in checkpoint and checkpoint[DIGEST_KEY] != digest_state(checkpoint)
