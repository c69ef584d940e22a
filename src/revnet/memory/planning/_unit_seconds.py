"""Measure the time of the units of a model by running steps."""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from revnet._bytes import format_bytes
from revnet._memory_readings import free_bytes
from revnet.errors import BudgetError
from revnet.memory.planning._search import ChainCosts
from revnet.memory.planning._timing import MeasuredTiming
from revnet.memory.planning._training_step import TrainingStep
from revnet.memory.planning._units import UnitInModel, assign
from revnet.memory.planning._variant_costs import VariantTiming
from revnet.memory.step._run_step import losses_of, tensors_in
from revnet.nn import AbstractPolicy
from revnet.nn._restore import restoring_state

_LEAST_EXTRA = 1e-3
"""Smallest fraction by which other policies are assumed to be slower than storing; below the clock's resolution."""


def measure_seconds(
    step: TrainingStep,
    units: Sequence[UnitInModel],
    costs: ChainCosts,
    variants: VariantTiming | None,
    timing: MeasuredTiming,
) -> list[npt.NDArray[np.float64]]:
    """Measure the part before the first unit, and each unit under each of its policies.

    Args:
        step: The step, whose model is left with other policies.
        units: Units in the order in which they run.
        costs: Counted costs, which show which units are alike and whether the step fits the free memory.
        variants: How to find the times of variants of `Reverse`; None without variants.
        timing: Number of rounds.

    Raises:
        BudgetError: Not one sample fits the free memory with all activations stored.
        ValueError: A tensor is on the meta device.
    """
    most = max(len(unit.kinds) for unit in units)
    # A unit with fewer choices has its last ones, which take the most memory.
    mixtures = [[unit.kinds[max(0, kind - most + len(unit.kinds))] for unit in units] for kind in range(most)]
    if variants is not None:
        mixtures += [variants.base, *variants.holds.policies(), *variants.slots.policies()]
    times = _time_mixtures(_fitting_free_memory(step, units, costs), units, mixtures, timing.num_rounds)
    # Disturbances only ever add time, so the fastest round counts.
    fastest = times.min(axis=0)
    for members in _alike(costs).values():
        fastest[:, members] = np.median(fastest[:, members], axis=1)[:, None]
    num_kinds = [1, *[len(unit.kinds) for unit in units]]
    seconds = [fastest[most - count : most, index].copy() for index, count in enumerate(num_kinds)]
    if variants is not None:
        base, *rest = fastest[most:]
        num_holds = len(variants.holds.mixtures)
        seconds = variants.seconds(seconds, base, rest[:num_holds], rest[num_holds:])
    for own in seconds:
        # Nothing does less work than storing, the last choice. A policy that seems faster is noise, and a plan must not
        # give up storing for it.
        own[:-1] = np.maximum(own[:-1], own[-1] * (1 + _LEAST_EXTRA))
    return seconds


def _fitting_free_memory(step: TrainingStep, units: Sequence[UnitInModel], costs: ChainCosts) -> TrainingStep:
    """Return the step with the most samples that fit the free memory with all activations stored."""
    for tensor in [*step.tensors, *step.model.parameters()]:
        if tensor.is_meta:
            raise ValueError(
                "`timing` (=MeasuredTiming) runs steps, but the model or its inputs are on the meta device, without "
                "data; pass real ones, or `RooflineTiming()`."
            )
    total = step.num_samples
    stored_bytes = costs.peak([0, *[len(unit.choices) - 1 for unit in units]])
    free = free_bytes(step.model_device)
    # Leave a fifth for memory outside tensors and for other processes.
    usable = None if free is None else free * 4 // 5
    most_samples = total if usable is None or stored_bytes <= usable else total * usable // stored_bytes
    if not most_samples:
        raise BudgetError(
            f"`timing` (=MeasuredTiming) runs steps with all activations stored, but not one of {total} samples fits "
            f"four fifths of the {format_bytes(free or 0)} that are free; use `RooflineTiming()`, or smaller inputs."
        )
    return step.first_samples(most_samples)


def _alike(costs: ChainCosts) -> dict[Hashable, list[int]]:
    """Group the indices of units with the same counted costs."""
    groups: dict[Hashable, list[int]] = {}
    for index, arrays in enumerate(zip(costs.held, costs.transient, costs.seconds, strict=True)):
        held, transient, seconds = arrays
        key = tuple(part.tobytes() for part in (held, transient - transient.min(), seconds))
        groups.setdefault(key, []).append(index)
    return groups


def _time_mixtures(
    step: TrainingStep,
    units: Sequence[UnitInModel],
    mixtures: Sequence[Sequence[AbstractPolicy]],
    num_rounds: int,
) -> npt.NDArray[np.float64]:
    """Return the seconds by round, mixture, and unit, where unit 0 is the part before the first unit."""
    times = np.zeros((num_rounds, len(mixtures), len(units) + 1))
    with restoring_state(step.model):
        for turn in range(-1, num_rounds):  # the first round warms up
            for number, policies in enumerate(mixtures):
                assign(step.model, units, policies)
                seconds = _time_step(step, units)
                if turn >= 0:
                    times[turn, number] = seconds
    return times


def _time_step(step: TrainingStep, units: Sequence[UnitInModel]) -> npt.NDArray[np.float64]:
    """Return the seconds of the part before the first unit and of each unit, forward and backward together."""
    for parameter in step.model.parameters():
        parameter.grad = None
    device = step.model_device
    clock = _Clock(device)
    with torch.enable_grad():
        with _marking(units, clock):
            clock.mark("begin")
            with nullcontext() if step.autocast is None else torch.autocast(device.type, step.autocast):
                losses = losses_of(step.model(*step.args, **step.kwargs), step.loss)
            clock.mark("turn")
        torch.autograd.backward(losses)
        clock.mark("end")
    at = clock.seconds()
    count = len(units)
    forward = [at["begin"], *[at["forward", index] for index in range(count)], at["turn"]]
    # A unit without a backward pass gets no backward time.
    backward = [at["end"], at.get("input", at["end"])]
    for index in range(1, count):
        backward.append(at.get(("backward", index - 1), backward[-1]))
    backward.append(at["turn"])
    return np.diff(forward) - np.diff(backward)


@contextmanager
def _marking(units: Sequence[UnitInModel], clock: "_Clock") -> Iterator[None]:
    """Mark when each unit begins, in the forward and in the backward pass."""

    def mark_forward(index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            clock.mark(("forward", index))
            if index == 0:
                _on_gradient(inputs, lambda: clock.mark("input"))

        return hook

    def mark_backward(index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            _on_gradient(output, lambda: clock.mark(("backward", index)))

        return hook

    with ExitStack() as stack:
        for index, unit in enumerate(units):
            stack.callback(unit.functions[0].register_forward_pre_hook(mark_forward(index)).remove)
            stack.callback(unit.functions[-1].register_forward_hook(mark_backward(index)).remove)
        yield


def _on_gradient(values: Any, act: Callable[[], None]) -> None:
    """Call `act` when the first tensor that requires a gradient receives it."""
    for tensor in tensors_in(values):
        if tensor.requires_grad:
            tensor.register_hook(lambda _: act())
            return


class _Clock:
    """Records the times of marks on a device."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._marks: dict[Any, Any] = {}

    def mark(self, name: Any) -> None:
        """Record the time of `name`; a later mark of the same name replaces it."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks[name] = event
        else:
            if self._device.type != "cpu":
                torch.accelerator.synchronize(self._device)
            self._marks[name] = time.perf_counter()

    def seconds(self) -> dict[Any, float]:
        """Return the time of each mark, in seconds after the mark "begin"."""
        begin = self._marks["begin"]
        if not self._is_cuda:
            return {name: at - begin for name, at in self._marks.items()}
        torch.cuda.synchronize(self._device)
        return {name: begin.elapsed_time(event) / 1e3 for name, event in self._marks.items()}
