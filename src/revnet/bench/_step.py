"""One training step of one contender: its bytes, its seconds, its gradients."""

import gc
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from revnet.bench._resized_bytes import ResizedBytes
from revnet.bench.cases import Case, FunctionPair
from revnet.bench.contenders import Contender


class StepBytes(NamedTuple):
    """What a step needs beyond parameters, gradients, buffers and the input."""

    peak_bytes: int
    """Most bytes alive at once."""
    held_bytes: int
    """Bytes alive between the forward and the backward pass."""


class Subject:
    """A contender on a case, ready to step.

    The loss is the output's product with fixed random numbers, summed: it costs next to nothing, keeps no activation,
    and its gradient is a dense tensor, as a network's head would send. Every step gets a fresh copy of the input, which
    requires a gradient as a stem's output does: memcnn overwrites it.

    Args:
        contender: The way of running.
        case: The workload.
        functions: The residual functions, shared with the other contenders.
        device: Where they are.
        dtype: Their type.
    """

    def __init__(
        self,
        contender: Contender,
        case: Case,
        functions: Sequence[FunctionPair],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        split_dim = case.split_dim if contender.split_dim is None else contender.split_dim
        self.device = device
        self.module = contender.make(functions, split_dim)
        self.parameters = [parameter for f, g in functions for h in (f, g) for parameter in h.parameters()]
        self._buffers = [buffer for f, g in functions for h in (f, g) for buffer in h.buffers()]
        self._x = torch.cat(case.streams(1), split_dim).to(device, dtype)
        self._weights = torch.cat(case.streams(2), split_dim).to(device, dtype)

    def fresh_input(self) -> Tensor:
        """A copy of the input."""
        return self._x.clone().requires_grad_()

    def zero_grad(self) -> None:
        """Set the gradients to allocated zeros, so that a step adds to them in place."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    def loss(self, x: Tensor) -> Tensor:
        """Run the forward pass."""
        return (self.module(x) * self._weights).sum()

    def gradients(self) -> list[Tensor]:
        """The gradients of all parameters after one step."""
        self.zero_grad()
        self.loss(self.fresh_input()).backward()
        return [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]

    def step_seconds(self) -> float:
        """Time one forward and backward pass."""
        return self._seconds(self.fresh_input(), backward=True)

    def forward_seconds(self) -> float:
        """Time one forward pass under `torch.no_grad`."""
        return self._seconds(self.fresh_input(), backward=False)

    def memory(self) -> StepBytes:
        """Bytes of one step beyond parameters, gradients, buffers and the input: counted on CPU, allocated on CUDA."""
        self.zero_grad()
        x = self.fresh_input()
        x.grad = torch.zeros_like(x)
        gc.collect()
        return self._allocated(x) if self.device.type == "cuda" else self._counted(x)

    def _seconds(self, x: Tensor, *, backward: bool) -> float:
        self.zero_grad()
        gc.collect()  # what one contender leaves behind must not be cleared on another one's time
        with nullcontext() if backward else torch.no_grad():
            if self.device.type != "cuda":
                start = time.perf_counter()
                self._run(x, backward=backward)
                return time.perf_counter() - start
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            start_event.record()
            self._run(x, backward=backward)
            end_event.record()
            torch.cuda.synchronize(self.device)
            return start_event.elapsed_time(end_event) / 1000

    def _run(self, x: Tensor, *, backward: bool) -> None:
        loss = self.loss(x)
        if backward:
            loss.backward()

    def _counted(self, x: Tensor) -> StepBytes:
        assert x.grad is not None
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        with ResizedBytes([*self.parameters, *gradients, *self._buffers, self._weights], [x, x.grad]) as counter:
            loss = self.loss(x)
            held_bytes = counter.live_bytes
            loss.backward()
        return StepBytes(peak_bytes=counter.peak_bytes, held_bytes=held_bytes)

    def _allocated(self, x: Tensor) -> StepBytes:
        self.loss(self.fresh_input()).backward()  # libraries allocate their workspaces at the first step
        torch.cuda.synchronize(self.device)
        gc.collect()
        baseline = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        loss = self.loss(x)
        held_bytes = torch.cuda.memory_allocated(self.device) - baseline
        loss.backward()
        torch.cuda.synchronize(self.device)
        return StepBytes(torch.cuda.max_memory_allocated(self.device) - baseline, held_bytes)


def gradient_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative L2 distance between corresponding gradients."""
    distances = [
        ((a.to(b.dtype) - b).norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny)).item()
        for a, b in zip(actual, expected, strict=True)
    ]
    return max(distances)
