"""Random numbers of images, as a function of a key for each image.

The key of an image is a function of seed, epoch and image. Every random number is a function of the key, of its purpose
and of its index, so it does not depend on the batch, the process or the device, and nothing has to be saved to draw the
same numbers again. Both are hashes, computed for a whole batch at once.

References:
    Steele, Lea and Flood (2014), Fast Splittable Pseudorandom Number Generators: SplitMix64, whose finalizer is the
    hash. Salmon et al. (2011), Parallel Random Numbers: As Easy as 1, 2, 3, for generators without state.
"""

from enum import IntEnum

import torch
from torch import Tensor


class Purpose(IntEnum):
    """Purpose of random numbers; two purposes have different numbers for the same key."""

    AUGMENT = 1
    COLOR = 2
    NOISE = 3


_BITS = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_FIRST_FACTOR, _SECOND_FACTOR = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MOST_PAIRS = 2**40
"""Distance of the counters of two purposes."""


def image_keys(seed: int, epoch: int, images: Tensor) -> Tensor:
    """Return the key of each image in an epoch.

    Args:
        seed: Seed of the loader.
        epoch: Number of the epoch.
        images: Numbers that identify the images: (B,), int64.

    Returns:
        The keys: (B,), int64.
    """
    start = _mix(_mix(seed) + epoch)
    return _mix_all(images * _signed(_GAMMA) + _signed(start))


def check_keys(keys: Tensor | None, images: Tensor) -> Tensor:
    """Return the keys of a batch on its device; without any, draw them from PyTorch's global CPU generator.

    Raises:
        ValueError: `keys` are not int64 of shape (B,).
    """
    if keys is None:
        keys = torch.randint(-(2**63), 2**63 - 1, images.shape[:1])
    elif keys.dtype != torch.int64 or keys.shape != images.shape[:1]:
        raise ValueError(
            f"`keys` (of shape {tuple(keys.shape)}, {keys.dtype}) must be int64 of shape ({len(images)},), one "
            "for each image; pass the keys that `make_loader(..., keys=True)` yields, or None."
        )
    return keys.to(images.device)


def uniform(keys: Tensor, count: int, purpose: Purpose) -> Tensor:
    """Return `count` independent numbers for each key, multiples of 2^-24, uniform in [0, 1): (B, count), float32."""
    # Each hash gives two numbers.
    num_pairs = (count + 1) // 2
    counters = torch.arange(num_pairs, device=keys.device) * _signed(_GAMMA)
    counters += _signed(purpose * _MOST_PAIRS * _GAMMA)
    bits = _mix_all(keys[:, None] + counters).view(torch.int32)[:, :count]  # (B, count)
    return ((bits >> 8) & (2**24 - 1)) * 2.0**-24


def _mix_all(bits: Tensor) -> Tensor:
    """Apply `_mix` to each number of an int64 tensor, in place. Products wrap around."""
    # PyTorch shifts the sign in, which the masks remove.
    bits ^= (bits >> 30) & (2**34 - 1)
    bits *= _signed(_FIRST_FACTOR)
    bits ^= (bits >> 27) & (2**37 - 1)
    bits *= _signed(_SECOND_FACTOR)
    bits ^= (bits >> 31) & (2**33 - 1)
    return bits


def _mix(number: int) -> int:
    """Return a hash of the lowest 64 bits: SplitMix64's finalizer."""
    number &= _BITS
    number = (number ^ (number >> 30)) * _FIRST_FACTOR & _BITS
    number = (number ^ (number >> 27)) * _SECOND_FACTOR & _BITS
    return number ^ (number >> 31)


def _signed(number: int) -> int:
    """Return the int64 with the lowest 64 bits of `number`."""
    return ((number + 2**63) & _BITS) - 2**63
