"""Parts of `DistributedMemory`."""

from dataclasses import dataclass, fields

from revnet.memory.step._memory_parts import Phase


@dataclass(frozen=True)
class DeviceBreakdown:
    """Bytes alive on one device at one moment, by kind."""

    parameters: int
    """Parameters that the device keeps: its shards with their padding, or whole ones."""
    buffers: int
    """Buffers of the model."""
    optimizer: int
    """State that the optimizer keeps from step to step."""
    inputs: int
    """Arguments of the model on this device."""
    gradients: int
    """Gradients of the parameters that the device keeps."""
    communication: int
    """Parameters that are gathered for a moment, buckets of gradients, and tensors that are sent or received."""
    activations: int
    """Everything else: activations, their gradients, and temporaries."""

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of one device during a training step."""

    name: str
    """Role of the device, such as "each device" or "stage 0"."""
    peak_bytes: int
    """Largest number of bytes alive at once."""
    peak_phase: Phase
    """Part of the step in which the peak occurs."""
    at_peak: DeviceBreakdown
    """Bytes alive at the peak, by kind."""
    parameter_bytes: int
    """Parameters that the device keeps, with their padding."""
    buffer_bytes: int
    gradient_bytes: int
    """Gradients after the backward pass."""
    optimizer_bytes: int
    """State of the optimizer; 0 if none was given."""
    input_bytes: int
    held_bytes: int
    """Activations alive between the forward and the backward pass: tensors that autograd saved, and the loss.

    In a pipeline, the largest number between the passes of two microbatches.
    """
    communication_bytes: int
    """Gathered parameters and buckets of gradients alive between the passes; in a pipeline, received streams."""


@dataclass(frozen=True)
class Communication:
    """Collectives of one kind that each device calls in one part of a step, or tensors that stages send."""

    phase: Phase
    kind: str
    """Name of the collective, such as "all-gather"."""
    count: int
    """Number of calls."""
    num_bytes: int
    """Sum of the sizes of the whole tensors: the output of an all-gather, the input of a reduce-scatter."""
