"""Random states of devices, read, set and compared."""

import ctypes

import torch
from torch import Tensor


# `torch.random.fork_rng` does this too, but queries every device first, which can cost more than a residual function.
def get_random_state(device: torch.device) -> Tensor:
    """Return the state of the device's default generator, as bytes on the CPU."""
    if device.type == "cpu":
        return torch.default_generator.get_state()
    module = torch.get_device_module(device)
    state: Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Set the state of the device's default generator."""
    if device.type == "cpu":
        torch.default_generator.set_state(state)
        return
    module = torch.get_device_module(device)
    if device.type == "mps":
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)


def bytes_of(state: Tensor) -> bytes:
    """Return the bytes of a random state."""
    # States are real bytes on the CPU even under FakeTensorMode, which would refuse to read them through a tensor.
    return ctypes.string_at(state.data_ptr(), state.numel())


def same_random_state(a: Tensor, b: Tensor) -> bool:
    """Whether two random states are the same."""
    return bytes_of(a) == bytes_of(b)
