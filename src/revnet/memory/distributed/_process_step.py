"""Run the training step of one process, and count its bytes and collectives."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import get_args

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from revnet.memory.distributed._device_memory import DeviceBreakdown
from revnet.memory.distributed._process_log import ProcessLog
from revnet.memory.step._memory_parts import Phase
from revnet.memory.step._run_step import tensors_in
from revnet.memory.step._step_log import Integers

KINDS = tuple(kind.name for kind in fields(DeviceBreakdown))
"""Kinds of bytes. A storage that serves two purposes belongs to the first of them."""
PHASES: tuple[Phase, ...] = get_args(Phase)

Passes = Callable[[Callable[[], None]], None]
"""Function that runs the passes of a step. It calls its argument between the passes, or at several such moments."""


@dataclass(frozen=True, eq=False)
class ProcessStep:
    """Bytes and collectives of one step of one process."""

    start: Integers
    """(kinds,) Bytes alive before the step."""
    changes: Mapping[Phase, Integers]
    """(rows, kinds) Differences in bytes one after the other, by phase; the last row of a phase is its end."""
    held: Integers
    """(kinds,) Largest number of bytes of each kind between the passes."""
    collectives: Mapping[tuple[Phase, str], tuple[int, int]]
    """Number of collectives and their bytes, by phase and kind."""
    whole_parameter_bytes: int
    """Bytes of the parameters of the whole model, without padding."""


def run_process_step(
    log: ProcessLog,
    model: nn.Module,
    inputs: Sequence[Tensor],
    passes: Passes,
    *,
    optimizer: Optimizer | None,
    optimizer_mode: AbstractContextManager[object] | None = None,
    num_warm_up: int,
) -> ProcessStep:
    """Run steps of a model that is divided among processes, and return the figures of the last one.

    Args:
        log: The log, active since before the model was sharded.
        model: The model of this process, without gradients.
        inputs: Arguments of the model in this process.
        passes: Runs the forward and the backward pass. What it runs before it calls its argument for the first time is
            the forward pass.
        optimizer: Optimizer of the model; None for none.
        optimizer_mode: Context of the optimizer's step, which may be entered several times.
        num_warm_up: Number of steps before the one that counts. They create the state of the optimizer, and DDP forms
            its buckets during the second.
    """

    def step() -> tuple[list[int], list[int], set[int]]:
        between: list[int] = []
        passes(lambda: between.append(log.mark()))
        ends = [between[0], log.mark()]
        if optimizer is not None:
            with optimizer_mode or nullcontext():
                optimizer.step()
        ends.append(log.mark())
        gradients = {log.index_of(parameter.grad) for parameter in model.parameters() if parameter.grad is not None}
        for tensor in (*model.parameters(), *inputs):
            tensor.grad = None
        return ends, between, gradients

    for _ in range(num_warm_up):
        step()
    groups: list[Sequence[Tensor]] = [
        list(model.parameters()),
        list(model.buffers()),
        [] if optimizer is None else tensors_in(list(optimizer.state.values())),
        inputs,
    ]
    storages = [{log.index_of(tensor) for tensor in group} for group in groups]
    first_row, first_call = log.mark(), len(log.collectives)
    ends, between, gradients = step()
    storages += [gradients, log.transferred]
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return _summed(log, storages, [first_row, *ends], between, first_call, whole)


def _summed(
    log: ProcessLog,
    storages: Sequence[set[int]],
    rows: Sequence[int],
    between: Sequence[int],
    first_call: int,
    whole_parameter_bytes: int,
) -> ProcessStep:
    kind_of = {index: kind for kind, indices in reversed(list(enumerate(storages))) for index in indices}
    changes = np.array(log.changes, np.int64).reshape(-1, 3)
    kinds = np.array([kind_of.get(index, len(KINDS) - 1) for index in changes[:, 1].tolist()], np.int64)
    table = np.zeros((rows[-1], len(KINDS)), np.int64)
    is_in_time = changes[:, 0] < rows[-1]
    np.add.at(table, (changes[is_in_time, 0], kinds[is_in_time]), changes[is_in_time, 2])
    collectives: dict[tuple[Phase, str], tuple[int, int]] = {}
    for call in log.collectives[first_call:]:
        phase = next((phase for phase, end in zip(PHASES, rows[1:], strict=True) if call.row < end), None)
        if phase is not None:
            number, num_bytes = collectives.get((phase, call.kind), (0, 0))
            collectives[phase, call.kind] = number + 1, num_bytes + call.num_bytes
    return ProcessStep(
        start=table[: rows[0]].sum(0),
        changes={phase: _compressed(table[rows[index] : rows[index + 1]]) for index, phase in enumerate(PHASES)},
        held=table.cumsum(0)[np.array(between) - 1].max(0),
        collectives=collectives,
        whole_parameter_bytes=whole_parameter_bytes,
    )


def _compressed(table: Integers) -> Integers:
    """Return the rows that change something, and the last one."""
    kept = np.flatnonzero(table.any(1)).tolist()
    return table[sorted({*kept, len(table) - 1})]
