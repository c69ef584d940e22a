"""Parts of `StepMemory`."""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Phase = Literal["forward", "backward", "optimizer"]


@dataclass(frozen=True)
class Breakdown:
    """Bytes alive at one moment of a training step, by kind."""

    parameters: int
    """Parameters of the model; tied ones count once."""
    buffers: int
    """Buffers of the model."""
    optimizer: int
    """State that the optimizer keeps from step to step."""
    inputs: int
    """Arguments of the model."""
    gradients: int
    """Gradients that are already stored in the `grad` of a parameter."""
    held: int
    """Activations that live from the forward to the backward pass."""
    transient: int
    """Everything else: activations and gradients that live within one pass, and temporaries of the optimizer."""

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class ModuleMemory:
    """Memory of one module, its children included."""

    name: str
    """Name in the model, such as "stages.0.3"; "" for the model itself."""
    kind: str
    """Name of its class."""
    parameter_bytes: int
    held_bytes: int
    """Activations created in it that are alive between the forward and the backward pass.

    The streams between reversible blocks belong to the sequence; a block owns what its residual functions create.
    """
    peak_bytes: int
    """Largest number of bytes alive, of every kind, while it ran in either pass; 0 if it never ran."""


@dataclass(frozen=True, eq=False)
class Timeline:
    """Bytes alive after every change, in order.

    The points from `backward_start` on belong to the backward pass, the points from `optimizer_start` on to the step of
    the optimizer.
    """

    activation_bytes: NDArray[np.int64]
    """Held and transient activations."""
    gradient_bytes: NDArray[np.int64]
    constant_bytes: int
    """Bytes alive during the whole step: parameters, buffers, optimizer state and inputs."""
    module_indices: NDArray[np.int64]
    """For each point, the index in `StepMemory.modules` of the module that ran; -1 for the loss and the optimizer."""
    backward_start: int
    optimizer_start: int
    """First point of the optimizer's step.

    It is the number of points if no optimizer was given, or if its step runs in the backward pass.
    """

    def __len__(self) -> int:
        return len(self.activation_bytes)


@dataclass(frozen=True)
class CudaMemory:
    """Memory that the GPU reported while the step was measured.

    The figures cover everything on the device, not only the step.
    """

    allocated_bytes: int
    """Largest number of bytes in tensors of this process, from `torch.cuda.max_memory_allocated`."""
    reserved_bytes: int
    """Largest number of bytes that PyTorch's allocator held, from `torch.cuda.max_memory_reserved`."""
    device_bytes: int
    """Bytes in use on the device after the step, by all processes, as `nvidia-smi` shows them."""
