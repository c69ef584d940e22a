"""How long the units of a model take under each policy: counted from shapes, or measured by running steps."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from revnet.memory._log import Integers
from revnet.memory._step import Loss, device_of, losses_of, tensors_in
from revnet.memory._units import Unit, assign
from revnet.nn._restore import restoring_state

_LEAST_EXTRA = 1e-3
"""What any other policy is taken to cost more than storing, as a share: less than a clock can tell."""


@dataclass(frozen=True, kw_only=True)
class CountedTiming:
    """Time by the roofline: an operation takes as long as its arithmetic or its memory traffic, whichever is longer.

    Needs nothing but shapes, and always says the same. Only the ratio of the two speeds matters, since plans compare
    times; what kernels really reach differs, so that overheads are rough: `MeasuredTiming` is for those who must know.

    Args:
        flops_per_byte: Floating-point operations that the device does in the time in which it moves a byte to or from
            its memory.

    References:
        Williams, Waterman and Patterson (2009), Roofline: An Insightful Visual Performance Model.
    """

    flops_per_byte: float = 30.0

    def __post_init__(self) -> None:
        if not (isinstance(self.flops_per_byte, int | float) and 0 < self.flops_per_byte < float("inf")):
            raise ValueError(
                f"`flops_per_byte` (={self.flops_per_byte!r}) must be above 0; 30 is usual for a CPU, 30 to 300 for a "
                "GPU."
            )

    def seconds(self, flops: Integers, moved_bytes: Integers) -> npt.NDArray[np.float64]:
        """The time of operations; the unit is that in which a device of 100 GB/s would take seconds."""
        return np.maximum(flops / self.flops_per_byte, moved_bytes) / 100e9


@dataclass(frozen=True, kw_only=True)
class MeasuredTiming:
    """Time by the clock: steps are run on the model's device under each policy, in turns.

    The model is left as it was. Where the plain net does not fit in the device's free memory, a smaller batch is timed.

    Args:
        num_rounds: Steps under each policy, after one that does not count. Of a unit's times the least counts, and of
            units that are alike the median; no policy counts as faster than storing.
    """

    num_rounds: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.num_rounds, int) or self.num_rounds < 1:
            raise ValueError(f"`num_rounds` (={self.num_rounds!r}) must be a positive integer.")


def measure_seconds(
    model: nn.Module,
    units: Sequence[Unit],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    loss: Loss | None,
    autocast: torch.dtype | None,
    num_rounds: int,
    kinds: Sequence[Any],
    most_samples: int | None = None,
) -> list[npt.NDArray[np.float64]]:
    """Time what lies before the first unit, and each unit under each of its policies.

    Args:
        model: The model, whose policies are changed.
        units: In the order in which they run.
        args: The model's arguments, on its device.
        kwargs: Its keyword arguments.
        loss: What to differentiate; None for the sum of all outputs.
        autocast: The lower precision of the forward pass.
        num_rounds: Steps under each policy.
        kinds: For what lies before the first unit and for each unit, a key that those alike share.
        most_samples: Where the inputs' batch is larger, its first so many are used.
    """
    args, kwargs = _first_samples(args, kwargs, most_samples)
    most_choices = max(len(unit.choices) for unit in units)
    times = np.zeros((num_rounds, most_choices, len(units) + 1))
    with restoring_state(model):
        for turn in range(-1, num_rounds):
            for choice in range(most_choices):
                # A unit with fewer choices has its last ones: those that cost most memory.
                policies = [unit.choices[max(0, choice - most_choices + len(unit.choices))] for unit in units]
                assign(model, units, policies)
                found = _time_step(model, units, args, kwargs, loss, autocast)
                if turn >= 0:
                    times[turn, choice] = found
    by_kind: dict[Any, list[int]] = {}
    for place, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(place)
    # What disturbs a machine only ever adds time: of the rounds the fastest counts.
    fastest = times.min(axis=0)
    for places in by_kind.values():
        fastest[:, places] = np.median(fastest[:, places], axis=1)[:, None]
    num_choices = [1, *[len(unit.choices) for unit in units]]
    seconds = [fastest[most_choices - count :, place] for place, count in enumerate(num_choices)]
    for own in seconds:
        # Nothing does less work than storing, the last choice: what seems faster is noise, for which a plan that may
        # store all would give up doing so.
        own[:-1] = np.maximum(own[:-1], own[-1] * (1 + _LEAST_EXTRA))
    return seconds


def _time_step(
    model: nn.Module,
    units: Sequence[Unit],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss: Loss | None,
    autocast: torch.dtype | None,
) -> npt.NDArray[np.float64]:
    """The seconds of what lies before the first unit, and of each unit, forward and backward."""
    for parameter in model.parameters():
        parameter.grad = None
    device = device_of(model, args, kwargs)
    clock = _Clock(device)
    with torch.enable_grad():
        with _marking(units, clock):
            clock.mark("begin")
            with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
                losses = losses_of(model(*args, **kwargs), loss)
            clock.mark("turn")
        torch.autograd.backward(losses)
        clock.mark("end")
    at = clock.seconds()
    count = len(units)
    forward = [at["begin"], *[at["forward", index] for index in range(count)], at["turn"]]
    # A unit whose backward pass was not seen takes none of the time.
    backward = [at["end"], at.get("input", at["end"])]
    for index in range(1, count):
        backward.append(at.get(("backward", index - 1), backward[-1]))
    backward.append(at["turn"])
    return np.diff(forward) - np.diff(backward)


@contextmanager
def _marking(units: Sequence[Unit], clock: "_Clock") -> Iterator[None]:
    """Mark when units begin, in the forward pass and in the backward pass."""

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


def _on_gradient(values: Any, act: Any) -> None:
    """Call `act` when the gradient of the first tensor that has one is there."""
    for tensor in tensors_in(values):
        if tensor.requires_grad:
            tensor.register_hook(lambda _: act())
            return


class _Clock:
    """Notes when marks are passed, on the device where the work is done."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._marks: dict[Any, Any] = {}

    def mark(self, name: Any) -> None:
        """Note the time of `name`; the last one counts."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks[name] = event
        else:
            self._marks[name] = time.perf_counter()

    def seconds(self) -> dict[Any, float]:
        """The marks, in seconds after the mark "begin"."""
        begin = self._marks["begin"]
        if not self._is_cuda:
            return {name: at - begin for name, at in self._marks.items()}
        torch.cuda.synchronize(self._device)
        return {name: begin.elapsed_time(event) / 1e3 for name, event in self._marks.items()}


def num_samples(*values: Any) -> int:
    """The batch size: what the first tensor has along its first dimension."""
    return next((tensor.shape[0] for tensor in tensors_in(values) if tensor.dim()), 1)


def _first_samples(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], count: int | None
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The first `count` samples of every tensor of the batch."""
    total = num_samples(args, kwargs)
    if count is None or count >= total:
        return args, kwargs

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:count] if tensor.dim() and tensor.shape[0] == total else tensor

    cut_args, cut_kwargs = tree_map_only(Tensor, cut, (args, dict(kwargs)))
    return cut_args, cut_kwargs
