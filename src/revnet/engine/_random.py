"""Random states of devices, which a replay restores so that it draws the same numbers."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CPU = torch.device("cpu")
ONLY_CPU = frozenset([_CPU])


cpu_random_state = torch.default_generator.get_state
memory_of: Any = (ctypes.c_char * cpu_random_state().numel()).from_address
"""Function that returns the memory of a state of the CPU's generator, given its address.

A state has 5,056 bytes, and is compared for every residual function. Comparing its memory with a `bytearray` takes much
less time than `torch.equal`.
"""

RandomStates = tuple[Tensor, bytearray, tuple[Tensor, ...]]
"""State of the CPU's generator, its bytes, and the states of the other devices."""


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
    return size == b.numel() and ctypes.string_at(a.data_ptr(), size) == ctypes.string_at(b.data_ptr(), size)


def digest(state: Tensor) -> int:
    """Return a number that represents a random state."""
    return hash(ctypes.string_at(state.data_ptr(), state.numel()))
