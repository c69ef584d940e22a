"""Compute the figures of a device from the changes of its step."""

import numpy as np

from revnet.memory.distributed._device_memory import Communication, DeviceBreakdown, DeviceMemory
from revnet.memory.distributed._process_step import PHASES, ProcessStep
from revnet.memory.step._step_log import Integers


def device_memory(step: ProcessStep, name: str) -> DeviceMemory:
    """Return the figures of one device."""
    bytes_at = step.start + np.concatenate([step.changes[phase] for phase in PHASES]).cumsum(0)
    bytes_at = np.concatenate([step.start[None], bytes_at])
    ends = np.cumsum([len(step.changes[phase]) for phase in PHASES])
    total = bytes_at.sum(1)
    peak = int(total.argmax())
    start, held, after_backward = _breakdown(step.start), _breakdown(step.held), _breakdown(bytes_at[ends[1]])
    return DeviceMemory(
        name=name,
        peak_bytes=int(total[peak]),
        peak_phase=PHASES[int(np.searchsorted(ends, peak))],
        at_peak=_breakdown(bytes_at[peak]),
        parameter_bytes=start.parameters,
        buffer_bytes=start.buffers,
        gradient_bytes=after_backward.gradients,
        optimizer_bytes=start.optimizer,
        input_bytes=start.inputs,
        held_bytes=held.activations,
        communication_bytes=held.communication,
    )


def communication_of(step: ProcessStep) -> tuple[Communication, ...]:
    """Return the collectives of a step, in the order of its phases."""
    return tuple(
        Communication(phase, kind, *step.collectives[phase, kind])
        for phase, kind in sorted(step.collectives, key=lambda key: (PHASES.index(key[0]), key[1]))
    )


def _breakdown(values: Integers) -> DeviceBreakdown:
    return DeviceBreakdown(*values.tolist())
