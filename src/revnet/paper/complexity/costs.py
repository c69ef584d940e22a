"""Measure the bytes, arithmetic and time of one step against depth.

References:
    Gomez et al. (2017), The Reversible Residual Network, table 1.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from revnet.bench import CASES, METHODS, Settings
from revnet.bench.cases import Case
from revnet.bench.methods import Method
from revnet.bench.run import TimeRow, measure_times
from revnet.memory import format_bytes, measure
from revnet.memory.step._flops import FlopCounter


@dataclass(frozen=True)
class Technique:
    """A method of running blocks and its complexity in the paper."""

    method: str
    """Name in `revnet.bench.METHODS`."""
    title: str
    activations: str | None = None
    """Growth of the activation memory with the number of layers, or None if the paper has no entry."""
    compute: str | None = None
    """Growth of the arithmetic with the number of layers."""


TECHNIQUES: Sequence[Technique] = (
    Technique("plain", "naive", "O(L)", "O(L)"),
    Technique("checkpoint", "checkpoint of each block"),
    Technique("checkpoint sqrt", "checkpointing", "O(sqrt L)", "O(L)"),
    Technique("checkpoint recursive", "recursive checkpointing", "O(log L)", "O(L log L)"),
    Technique("revnet", "reversible", "O(1)", "O(L)"),
)


@dataclass(frozen=True)
class ComplexitySettings:
    """Number of measurements, and the device.

    Raises:
        ValueError: A depth or the number of rounds is not positive, or there are fewer than two depths.
    """

    case: Case = CASES[0]
    """Workload."""
    memory_depths: Sequence[int] = (4, 16, 64, 256)
    """Increasing numbers of blocks for bytes and arithmetic, which are counted from shapes alone."""
    time_depths: Sequence[int] = (4, 16)
    """Increasing numbers of blocks for times."""
    num_rounds: int = 5
    """Number of timed steps of each technique."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device on which times are measured."""

    def __post_init__(self) -> None:
        for name, depths in (("memory_depths", self.memory_depths), ("time_depths", self.time_depths)):
            if any(depth < 1 for depth in depths) or list(depths) != sorted(set(depths)):
                raise ValueError(f"`{name}` (={list(depths)}) must be positive and increasing, such as [4, 16].")
        if len(self.memory_depths) < 2:
            raise ValueError(
                f"`memory_depths` (={list(self.memory_depths)}) must have at least two entries, to show growth."
            )
        if self.num_rounds < 1:
            raise ValueError(f"`num_rounds` (={self.num_rounds}) must be at least 1; 5 is usual.")


QUICK_COMPLEXITY = ComplexitySettings(memory_depths=(4, 16), time_depths=(4,), num_rounds=3)
"""Settings for a quick look, which takes a few seconds."""


@dataclass(frozen=True)
class Cost:
    """Memory and arithmetic of one step of one technique."""

    method: str
    depth: int
    peak_bytes: int
    """Largest number of bytes alive at once, not counting parameters, gradients, buffers and the input."""
    held_bytes: int
    """Bytes alive between the forward and the backward pass."""
    flops: int
    """Operations of the forward and the backward pass, two for each multiply-add."""


@dataclass(frozen=True)
class Complexity:
    """All measurements."""

    settings: ComplexitySettings
    costs: Sequence[Cost]
    times: Sequence[TimeRow]

    def costs_of(self, technique: Technique) -> list[Cost]:
        """Return the costs of one technique, by depth."""
        return [cost for cost in self.costs if cost.method == technique.method]

    def times_of(self, technique: Technique) -> list[TimeRow]:
        """Return the times of one technique, by depth."""
        return [row for row in self.times if row.method == technique.method]


def measure_complexity(settings: ComplexitySettings, say: Callable[[str], None] = print) -> Complexity:
    """Count bytes and arithmetic of all techniques at all depths, and time their steps.

    Args:
        settings: Number of measurements, and the device.
        say: Function that receives a line for each result.
    """
    costs, times = [], []
    with torch.random.fork_rng(devices=[]):  # the workload seeds PyTorch's global generator
        for depth in settings.memory_depths:
            for cost in _costs(settings.case, depth):
                costs.append(cost)
                say(f"{depth} blocks, {cost.method}: {format_bytes(cost.peak_bytes)}, {cost.flops:.3e} FLOPs")
        for depth in settings.time_depths:
            only = Settings(time_depth=depth, num_rounds=settings.num_rounds, device=settings.device)
            rows, _ = measure_times(settings.case, only, _methods())
            for row in rows:
                times.append(row)
                ratio = row.note if row.times is None else f"{row.times.over_plain.median:.2f} times plain"
                say(f"{depth} blocks, {row.method}: step time {ratio}")
    return Complexity(settings, costs, times)


def growth_exponent(depths: Sequence[int], values: Sequence[float]) -> float:
    """Return the slope of log value against log depth: 1 for linear growth, 0 for no growth.

    Args:
        depths: Two or more depths.
        values: One value per depth.
    """
    return statistics.linear_regression([*map(math.log, depths)], [*map(math.log, values)]).slope


def _methods() -> list[Method]:
    by_name = {method.name: method for method in METHODS}
    return [by_name[technique.method] for technique in TECHNIQUES]


def _costs(case: Case, depth: int) -> Iterator[Cost]:
    device = torch.device("meta")  # nothing is allocated or computed, and the bytes are the same
    functions = case.functions(depth, device)
    for method in _methods():
        module = method.make(functions, case.split_dim)
        x = torch.cat(case.streams(1), case.split_dim).to(device).requires_grad_()  # like the output of a stem
        with FlopCounter() as counter:
            memory = measure(module, x)
        yield Cost(method.name, depth, memory.activation_bytes, memory.held_bytes, counter.flops)
