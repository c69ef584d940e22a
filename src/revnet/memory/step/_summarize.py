"""Compute the figures of a step from its log."""

import numpy as np
import torch
from torch import Tensor, nn

from revnet.memory.step._memory_parts import Breakdown, CudaMemory, ModuleMemory, Phase, Timeline
from revnet.memory.step._optimizer import OptimizerCost
from revnet.memory.step._run_step import StepResult
from revnet.memory.step._step_log import NO_MODULE, Integers, StepLog
from revnet.memory.step._step_memory import StepMemory


def summarize(
    model: nn.Module,
    result: StepResult,
    optimizer: OptimizerCost | None,
    cuda: CudaMemory | None = None,
    modules: "ModuleTable | None" = None,
) -> StepMemory:
    """Return the figures of one step of `model`, followed by the step of its optimizer.

    Args:
        model: The model.
        result: The step.
        optimizer: Memory of the optimizer, if there is one.
        cuda: Memory that the GPU reported.
        modules: The modules of the model, if they are known.
    """
    log, constants = result.log, result.constants
    state_bytes = 0 if optimizer is None else optimizer.state_bytes
    constant_bytes = sum(constants) + state_bytes
    in_optimizer = np.zeros(0, np.int64) if optimizer is None else optimizer.step_bytes
    activations = np.concatenate((log.activation_bytes, log.activation_bytes[-1] + in_optimizer))
    gradients = np.concatenate((log.gradient_bytes, np.full(len(in_optimizer), log.gradient_bytes[-1])))
    owners = np.concatenate((log.owners, np.full(len(in_optimizer), NO_MODULE)))
    total = constant_bytes + activations + gradients
    peak = int(total.argmax())
    held_at_peak = _held_bytes_at(log, peak)
    return StepMemory(
        peak_bytes=int(total[peak]),
        at_peak=Breakdown(
            parameters=constants.parameters,
            buffers=constants.buffers,
            optimizer=state_bytes,
            inputs=constants.inputs,
            gradients=int(gradients[peak]),
            held=held_at_peak,
            transient=int(activations[peak]) - held_at_peak,
        ),
        peak_phase=_phase_of(log, peak),
        peak_module="" if owners[peak] == NO_MODULE else log.modules[owners[peak]],
        activation_bytes=int(log.activation_bytes.max()),
        held_bytes=log.held_bytes,
        parameter_bytes=constants.parameters,
        buffer_bytes=constants.buffers,
        gradient_bytes=int(log.gradient_bytes[-1]),
        optimizer_bytes=state_bytes,
        input_bytes=constants.inputs,
        modules=(modules or ModuleTable(model)).memory(log, total[: log.num_events]),
        timeline=_timeline(log, activations, gradients, owners, constant_bytes),
        cuda=cuda,
    )


def _phase_of(log: StepLog, event: int) -> Phase:
    if event <= log.forward_end:
        return "forward"
    return "backward" if event < log.num_events else "optimizer"


def _held_bytes_at(log: StepLog, event: int) -> int:
    """Return the bytes alive at an event in storages that are held between the passes."""
    alive = log.live(min(event, log.num_events - 1))
    alive = alive[log.is_held[alive]]
    return int(log.sizes[alive].sum())


class ModuleTable:
    """The modules of a model, with the bytes of their parameters.

    Args:
        model: The model.
        dtype: Data type to which the floating-point parameters count as converted.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None):
        modules = dict(model.named_modules())
        self._names, self._kinds = list(modules), [type(module).__name__ for module in modules.values()]
        indices = {name: index for index, name in enumerate(modules)}
        self._parents = np.array([indices[name.rpartition(".")[0]] for name in modules], np.int64)
        depths = np.array([name.count(".") + 1 if name else 0 for name in modules])
        self._levels = [np.flatnonzero(depths == depth) for depth in range(depths.max(), 0, -1)]
        parameters: list[dict[int, int]] = [{} for _ in modules]
        for index, module in enumerate(modules.values()):
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameters[index][id(parameter)] = _num_bytes(parameter, dtype)
        for index in range(len(modules) - 1, 0, -1):  # children follow their parents
            parameters[self._parents[index]] |= parameters[index]
        self._parameter_bytes = [sum(own.values()) for own in parameters]

    def memory(self, log: StepLog, total: Integers) -> tuple[ModuleMemory, ...]:
        """Return the memory of each module with its children: sums of parameters and held bytes, maxima of peaks.

        Args:
            log: Log of a step of the model.
            total: (events,) Bytes alive at each event.
        """
        held, peaks = np.zeros((2, len(self._names)), np.int64)
        is_owned = log.is_held & (log.creators != NO_MODULE)
        np.add.at(held, log.creators[is_owned], log.sizes[is_owned])
        is_owned = log.owners != NO_MODULE
        np.maximum.at(peaks, log.owners[is_owned], total[is_owned])
        for level in self._levels:
            np.add.at(held, self._parents[level], held[level])
            np.maximum.at(peaks, self._parents[level], peaks[level])
        columns = zip(self._names, self._kinds, self._parameter_bytes, held.tolist(), peaks.tolist(), strict=True)
        return tuple([ModuleMemory(*row) for row in columns])


def _num_bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    return tensor.numel() * dtype.itemsize


def _timeline(
    log: StepLog, activations: Integers, gradients: Integers, owners: Integers, constant_bytes: int
) -> Timeline:
    """Return the events that change the bytes alive, and the last event of each pass."""
    is_change = np.ones(len(activations), np.bool_)
    is_change[1:] = (np.diff(activations) != 0) | (np.diff(gradients) != 0)
    is_change[[log.forward_end, log.num_events - 1]] = True
    points = np.flatnonzero(is_change)
    return Timeline(
        activation_bytes=activations[points],
        gradient_bytes=gradients[points],
        constant_bytes=constant_bytes,
        module_indices=owners[points],
        backward_start=int(np.searchsorted(points, log.forward_end, side="right")),
        optimizer_start=int(np.searchsorted(points, log.num_events)),
    )
