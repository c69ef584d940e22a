"""The hash of a file of weights, which notices a flipped bit."""

from collections.abc import Mapping
from hashlib import blake2b

from torch import Tensor, uint8

HASH_KEY = "hash"
"""Key of the hash in the metadata of a file of weights."""
_ALGORITHM = "blake2b-128"


def hash_weights(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of a file of weights: BLAKE2b of 128 bits, over the metadata and the bytes of all tensors.

    It covers the entries of the metadata except the hash itself, and the name, the type, the shape and the bytes of
    each tensor, both sorted by name. It reveals damage, not intent: anyone who changes a file can change its hash.
    """
    digest = blake2b(digest_size=16)
    for name in sorted(metadata.keys() - {HASH_KEY}):
        digest.update(f"{name}={metadata[name]}\0".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(uint8).numpy().data)
    return f"{_ALGORITHM}:{digest.hexdigest()}"


def is_damaged(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the tensors or the metadata have changed since they were written; false if they have no hash."""
    stored = metadata.get(HASH_KEY)
    return stored is not None and stored != hash_weights(metadata, tensors)
