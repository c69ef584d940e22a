"""Run one training step of one method and measure its bytes, seconds and gradients."""

import gc
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from revnet.bench._profiled_bytes import profile_step
from revnet.bench._resized_bytes import ResizedBytes
from revnet.bench.cases import Case, FunctionPair
from revnet.bench.methods import Method


class StepBytes(NamedTuple):
    """Memory of a step, not counting parameters, gradients, buffers and the input."""

    peak_bytes: int
    """Largest number of bytes alive at once."""
    held_bytes: int
    """Bytes alive between the forward and the backward pass."""


class Runner:
    """A method applied to a case, ready to run training steps.

    The loss is the sum of the output times fixed random numbers. It costs little, stores no activation, and has a dense
    gradient, as the head of a network would send. Each step gets a new copy of the input, since memcnn overwrites its
    input. The copy requires a gradient, like the output of a stem.

    Args:
        method: Way of running the blocks.
        case: Workload.
        functions: Residual functions, shared with the other methods.
        device: Device of the functions.
        dtype: Data type of the functions.
    """

    def __init__(
        self,
        method: Method,
        case: Case,
        functions: Sequence[FunctionPair],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        split_dim = case.split_dim if method.split_dim is None else method.split_dim
        self.device = device
        self.is_compiled = method.is_compiled
        self.module = method.make(functions, split_dim)
        self.parameters = [parameter for f, g in functions for h in (f, g) for parameter in h.parameters()]
        self._buffers = [buffer for f, g in functions for h in (f, g) for buffer in h.buffers()]
        self._x = torch.cat(case.streams(1), split_dim).to(device, dtype)
        self._weights = torch.cat(case.streams(2), split_dim).to(device, dtype)

    def fresh_input(self) -> Tensor:
        """Return a new copy of the input."""
        return self._x.clone().requires_grad_()

    def zero_grad(self) -> None:
        """Fill the gradients with zeros, allocated before the step so that the step adds to them in place."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    def loss(self, x: Tensor) -> Tensor:
        """Run the forward pass and return the loss."""
        return (self.module(x) * self._weights).sum()

    def gradients(self) -> list[Tensor]:
        """Return the gradients of all parameters after one step."""
        self.zero_grad()
        self.loss(self.fresh_input()).backward()
        return [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]

    def step_seconds(self) -> float:
        """Return the time of one forward and backward pass."""
        return self._seconds(self.fresh_input(), backward=True)

    def forward_seconds(self) -> float:
        """Return the time of one forward pass under `torch.no_grad`."""
        return self._seconds(self.fresh_input(), backward=False)

    def memory(self) -> StepBytes:
        """Return the memory of one step: counted on the CPU, read from the allocator on CUDA or in compiled code."""
        self.zero_grad()
        x = self.fresh_input()
        x.grad = torch.zeros_like(x)
        gc.collect()
        if self.device.type == "cuda":
            return self._allocated(x)
        return self._profiled(x) if self.is_compiled else self._counted(x)

    def _seconds(self, x: Tensor, *, backward: bool) -> float:
        self.zero_grad()
        gc.collect()  # so that a method does not pay for collecting another one's garbage
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

    def _profiled(self, x: Tensor) -> StepBytes:
        self.loss(self.fresh_input()).backward()  # compiles
        gc.collect()
        return StepBytes(*profile_step(lambda: self.loss(x)))

    def _allocated(self, x: Tensor) -> StepBytes:
        self.loss(self.fresh_input()).backward()  # libraries allocate their workspaces in the first step
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
    """Return the largest relative L2 distance between corresponding gradients."""
    distances = [
        ((a.to(b.dtype) - b).norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny)).item()
        for a, b in zip(actual, expected, strict=True)
    ]
    return max(distances)
