"""What is known of the memory of a training step."""

from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from revnet.memory._report import report_lines

Phase = Literal["forward", "backward", "optimizer"]


@dataclass(frozen=True)
class Breakdown:
    """What some bytes are of; all in bytes."""

    parameters: int
    """Of the model, tied ones once."""
    buffers: int
    """Of the model."""
    optimizer: int
    """State that the optimizer keeps from step to step."""
    inputs: int
    """The model's arguments."""
    gradients: int
    """Those that are in `grad` of a parameter already."""
    held: int
    """Activations that live between the forward and the backward pass."""
    transient: int
    """Everything else: activations and their gradients that come and go within one pass, the optimizer's too."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class ModuleMemory:
    """What one module, with its children, has to do with."""

    name: str
    """Where it is in the model: "stages.0.3"; "" for the model itself."""
    kind: str
    """Its class."""
    parameter_bytes: int
    held_bytes: int
    """Activations created in it that are alive between the forward and the backward pass.

    A sequence of reversible blocks owns the streams between them: to its blocks count their residual functions.
    """
    peak_bytes: int
    """Most bytes alive, everything counted, while it computed in the forward or in the backward pass; 0 if it never
    did."""


@dataclass(frozen=True, eq=False)
class Timeline:
    """Live bytes at every change, in order: what a picture of the step shows.

    The points from `backward_start` on belong to the backward pass, those from `optimizer_start` on to the optimizer.
    """

    activation_bytes: NDArray[np.int64]
    """Held and transient ones together."""
    gradient_bytes: NDArray[np.int64]
    constant_bytes: int
    """What is there all the time: parameters, buffers, the optimizer's state, inputs."""
    module_indices: NDArray[np.int64]
    """For each point, the place in `StepMemory.modules` of the module that computed; -1 for the loss and the
    optimizer."""
    backward_start: int
    optimizer_start: int
    """The number of points if no optimizer was given."""

    def __len__(self) -> int:
        return len(self.activation_bytes)


@dataclass(frozen=True)
class CudaMemory:
    """What the GPU said while the step was measured; all figures are of everything there, not of the step alone."""

    allocated_bytes: int
    """Most bytes that tensors of this process took, as `torch.cuda.max_memory_allocated` has it."""
    reserved_bytes: int
    """Most bytes that PyTorch's allocator had taken from the driver, `torch.cuda.max_memory_reserved`."""
    device_bytes: int
    """Bytes in use on the device after the step, by all processes: what `nvidia-smi` shows."""


@dataclass(frozen=True)
class StepMemory:
    """The memory of one training step: its peak, what that is of, and where it arises.

    Bytes are those of tensors. Print it for a table.
    """

    peak_bytes: int
    """Most bytes alive at once, everything counted: model, inputs, activations, gradients, the optimizer's state."""
    at_peak: Breakdown
    """What was alive then."""
    peak_phase: Phase
    """When it was."""
    peak_module: str
    """The module that computed then; "" for the model itself, the loss and the optimizer."""
    activation_bytes: int
    """Most bytes of activations alone at once, their gradients included, those of parameters not.

    What a step needs beyond the model, the gradients of its parameters and its inputs.
    """
    held_bytes: int
    """Activations alive between the forward and the backward pass: what autograd holds, and the loss."""
    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    """The gradients of all parameters, as they are after the backward pass."""
    optimizer_bytes: int
    """State that the optimizer keeps from step to step; 0 if none was given."""
    input_bytes: int
    modules: tuple[ModuleMemory, ...] = field(repr=False)
    """One for each module, in the order of the model's `named_modules`."""
    timeline: Timeline = field(repr=False, compare=False)
    cuda: CudaMemory | None = field(default=None, compare=False)
    """What the GPU said, if it was measured on one."""

    def report(self, *, depth: int = 2) -> str:
        """The figures as a table of text.

        Args:
            depth: How far down to list modules: 0 lists the model only, 1 its children too.
        """
        return "\n".join(report_lines(self, depth))

    def __str__(self) -> str:
        return self.report()
