"""Time and memory of steps on a GPU, or on the CPU for a dry run."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from _gpu_part import Setting

from revnet.bench.host import frozen
from revnet.bench.pitfalls import one_line

NUM_STEPS = 3
"""Number of steps timed together, after one to warm up."""
SLOW_SECONDS = 0.1
"""Limit above which a step is timed alone, without a step to warm up."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 25


class Turn(NamedTuple):
    """Time of one step."""

    step_seconds: float
    """Time from the first launch until the GPU is done."""
    host_seconds: float
    """Processor time of all threads until all kernels are launched."""


class Peak(NamedTuple):
    """Statistics of PyTorch's allocator during a step. All are None on the CPU."""

    before_bytes: int | None
    """Bytes allocated before the step."""
    allocated_bytes: int | None
    """Peak of allocated bytes."""
    reserved_bytes: int | None
    """Peak of bytes reserved from the driver."""

    @property
    def grown_bytes(self) -> int | None:
        """Peak of allocated bytes minus the bytes before the step."""
        return None if self.allocated_bytes is None else self.allocated_bytes - self.before_bytes


def synchronize(device: torch.device) -> None:
    """Wait until the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Return unused cached memory to the driver."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def take_turn(step: Callable[[], object], device: torch.device, *, num_warmups: int, num_steps: int) -> Turn:
    """Run steps to warm up, then time some."""
    gc.collect()
    for _ in range(num_warmups):
        step()
    synchronize(device)
    processor, wall = time.process_time(), time.perf_counter()
    for _ in range(num_steps):
        step()
    host = time.process_time() - processor
    synchronize(device)
    return Turn((time.perf_counter() - wall) / num_steps, host / num_steps)


def take_turns(steps: Mapping[str, Callable[[], object]], setting: Setting, *, seconds: float) -> dict[str, list[Turn]]:
    """Time the steps in rounds, in changing order, for about `seconds`.

    There are at least three rounds, unless they take far longer. Each step must have run before.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in steps}
    least, most = (1, 1) if setting.quick else (LEAST_ROUNDS, MOST_ROUNDS)
    shuffle = random.Random(0).shuffle
    start = time.perf_counter()
    with frozen():
        for number in range(most):
            spent = time.perf_counter() - start
            if number and spent > (seconds if number >= least else 3 * seconds):
                break
            names = list(steps)
            shuffle(names)
            for name in names:
                is_slow = setting.quick or (bool(turns[name]) and turns[name][-1].step_seconds > SLOW_SECONDS)
                num_warmups, num_steps = (0, 1) if is_slow else (1, NUM_STEPS)
                turns[name].append(take_turn(steps[name], setting.device, num_warmups=num_warmups, num_steps=num_steps))
    return turns


def median_ratio(values: Sequence[float], references: Sequence[float]) -> float:
    """Return the median over rounds of the ratio within the round."""
    return statistics.median([value / reference for value, reference in zip(values, references, strict=True)])


def watch(step: Callable[[], object], device: torch.device) -> Peak:
    """Run one step and return its memory statistics. The step must have run before."""
    if device.type != "cuda":
        step()
        return Peak(None, None, None)
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return Peak(before, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))


def attempt(function: Callable[[], object], device: torch.device) -> str:
    """Call `function` and return the reason of a failure, or "" on success.

    A step that runs out of memory must not end the part.
    """
    note = ""
    try:
        function()
        synchronize(device)
    except torch.OutOfMemoryError:
        note = "out of memory"
    except RuntimeError as error:
        note = one_line(error)
    if note:
        release(device)  # here the error and its traceback no longer hold tensors
    return note


def low_precision(device: torch.device) -> torch.dtype:
    """Return the 16-bit dtype of the device."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16
