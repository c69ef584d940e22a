"""Run the training step of one process, and count its bytes and collectives."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from revnet.memory.distributed._process_log import ProcessLog
from revnet.memory.step._memory_parts import Phase
from revnet.memory.step._run_step import Loss, losses_of, tensors_in
from revnet.memory.step._step_log import Integers

KINDS = ("parameters", "buffers", "optimizer", "inputs", "gradients", "communication", "activations")
"""Kinds of bytes. A storage that serves two purposes belongs to the first of them."""
PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")


@dataclass(frozen=True, eq=False)
class ProcessStep:
    """Bytes and collectives of one step of one process."""

    start: Integers
    """(kinds,) Bytes alive before the step."""
    changes: Mapping[Phase, Integers]
    """(rows, kinds) Differences in bytes one after the other, by phase; the last row of a phase is its end."""
    collectives: Mapping[tuple[Phase, str], tuple[int, int]]
    """Number of collectives and their bytes, by phase and kind."""
    whole_parameter_bytes: int
    """Bytes of the parameters of the whole model, without padding."""


def run_process_step(
    log: ProcessLog,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    optimizer: Optimizer | None,
    loss: Loss | None,
    autocast: torch.dtype | None,
    num_warm_up: int,
) -> ProcessStep:
    """Run steps of a model that is sharded or replicated over processes, and return the figures of the last one.

    Args:
        log: The log, active since before the model was sharded.
        model: The model of this process, without gradients.
        args: Positional arguments of the model in this process.
        kwargs: Its keyword arguments.
        optimizer: Optimizer of the model; None for none.
        loss: Function from the output to a scalar; None for the sum of all outputs that require a gradient.
        autocast: Data type in which autocast runs the forward pass and the loss; None keeps the current setting.
        num_warm_up: Number of steps before the one that counts. They create the state of the optimizer, and DDP forms
            its buckets during the second.
    """

    def step() -> tuple[list[int], set[int]]:
        torch.clear_autocast_cache()
        with torch.enable_grad():
            with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                losses = losses_of(model(*args, **kwargs), loss)
            rows = [log.mark()]
            torch.autograd.backward(losses)
        del losses
        rows.append(log.mark())
        if optimizer is not None:
            optimizer.step()
        rows.append(log.mark())
        gradients = {log.index_of(parameter.grad) for parameter in model.parameters() if parameter.grad is not None}
        for tensor in [*model.parameters(), *tensors_in(args, kwargs)]:
            tensor.grad = None
        return rows, gradients

    for _ in range(num_warm_up):
        step()
    groups: list[Iterable[Tensor]] = [
        list(model.parameters()),
        list(model.buffers()),
        [] if optimizer is None else tensors_in(list(optimizer.state.values())),
        tensors_in(args, kwargs),
    ]
    storages = [{log.index_of(tensor) for tensor in group} for group in groups]
    first_row, first_call = log.mark(), len(log.collectives)
    rows, gradients = step()
    storages += [gradients, log.transferred]
    return _summed(log, storages, [first_row, *rows], first_call, _whole_bytes(model))


def _summed(
    log: ProcessLog, storages: list[set[int]], rows: list[int], first_call: int, whole_parameter_bytes: int
) -> ProcessStep:
    kind_of = {index: kind for kind, indices in reversed(list(enumerate(storages))) for index in indices}
    changes = np.array(log.changes, np.int64).reshape(-1, 3)
    kinds = np.array([kind_of.get(index, len(KINDS) - 1) for index in changes[:, 1].tolist()], np.int64)
    table = np.zeros((rows[-1], len(KINDS)), np.int64)
    is_in_time = changes[:, 0] < rows[-1]
    np.add.at(table, (changes[is_in_time, 0], kinds[is_in_time]), changes[is_in_time, 2])
    phases = {phase: _compressed(table[rows[i] : rows[i + 1]]) for i, phase in enumerate(PHASES)}
    collectives: dict[tuple[Phase, str], tuple[int, int]] = {}
    for call in log.collectives[first_call:]:
        phase = next((phase for phase, end in zip(PHASES, rows[1:], strict=True) if call.row < end), None)
        if phase is not None:
            number, num_bytes = collectives.get((phase, call.kind), (0, 0))
            collectives[phase, call.kind] = number + 1, num_bytes + call.num_bytes
    return ProcessStep(table[: rows[0]].sum(0), phases, collectives, whole_parameter_bytes)


def _compressed(table: Integers) -> Integers:
    """Return the rows that change something, and the last one."""
    kept = np.flatnonzero(table.any(1)).tolist()
    return table[sorted({*kept, len(table) - 1})]


def _whole_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
