"""Random states of devices, which a replay restores so that it draws the same numbers."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CPU = torch.device("cpu")
ONLY_CPU = frozenset([_CPU])


cpu_random_state = torch.default_generator.get_state
NUM_BYTES = cpu_random_state().numel()
"""Size of a state of the CPU's generator."""

RandomStates = tuple[Tensor, int, tuple[Tensor, ...]]
"""State of the CPU's generator, the address of its bytes, and the states of the other devices."""


def by_device(others: Sequence[torch.device], states: RandomStates) -> list[tuple[torch.device, Tensor]]:
    """Return each device with its random state: the CPU, and the other devices that have a state here."""
    return list(zip((_CPU, *others), (states[0], *states[2]), strict=False))


# `fork_rng` would do this, but it queries every device first, which costs more than many residual functions.
def get_random_state(device: torch.device) -> Tensor:
    """Return the random state of a device, as a tensor of bytes on the CPU."""
    if device.type == "cpu":
        return torch.default_generator.get_state()
    module = torch.get_device_module(device)
    return module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Set the random state of a device."""
    if device.type == "cpu":
        torch.default_generator.set_state(state)
        return
    module = torch.get_device_module(device)
    if device.type == "mps":
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)


def same_random_state(a: Tensor, b: Tensor) -> bool:
    """Return whether two random states are equal."""
    # States are real bytes on the CPU even under FakeTensorMode, which rejects comparing them as tensors.
    size = a.numel()
    return size == b.numel() and compare_bytes(a.data_ptr(), b.data_ptr(), size) == 0


def digest(state: Tensor) -> int:
    """Return a number that represents a random state."""
    return hash(ctypes.string_at(state.data_ptr(), state.numel()))


def _compare_copies(a: int, b: int, size: int) -> int:
    return int(ctypes.string_at(a, size) != ctypes.string_at(b, size))


# A state of the CPU's generator has 5,056 bytes, and is compared for every residual function. `memcmp` takes a tenth of
# the time of `torch.equal`. If the C library cannot be loaded this way (Windows), copies are compared.
compare_bytes: Any = _compare_copies
try:
    compare_bytes = ctypes.PyDLL(None).memcmp  # Faster than releasing the interpreter's lock.
    compare_bytes.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
except (OSError, TypeError, AttributeError):
    pass
