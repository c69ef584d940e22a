"""The paper's table of complexities, measured: bytes, arithmetic and time of one step against depth.

References:
    Gomez et al. (2017), The Reversible Residual Network, table 1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from revnet.bench import CASES, CONTENDERS, Case, Contender, Settings
from revnet.bench.run import TimeRow, measure_times
from revnet.memory import FlopCounter, format_bytes, measure


@dataclass(frozen=True)
class Technique:
    """A way of running blocks, and what the paper says of it."""

    contender: str
    """Its name in `revnet.bench.CONTENDERS`."""
    title: str
    activations: str | None = None
    """Growth of the memory for activations with the number of layers; None where the paper does not speak of it."""
    compute: str | None = None
    """Growth of the arithmetic."""


TECHNIQUES: Sequence[Technique] = (
    Technique("plain", "naive", "O(L)", "O(L)"),
    Technique("checkpoint", "checkpoint of each block"),
    Technique("checkpoint sqrt", "checkpointing", "O(sqrt L)", "O(L)"),
    Technique("checkpoint recursive", "recursive checkpointing", "O(log L)", "O(L log L)"),
    Technique("revnet", "reversible", "O(1)", "O(L)"),
)


@dataclass(frozen=True)
class ComplexitySettings:
    """How much to measure.

    Raises:
        ValueError: A depth or the number of rounds is not positive, or there are fewer than two depths.
    """

    case: Case = CASES[0]
    """The workload."""
    memory_depths: Sequence[int] = (4, 16, 64, 256)
    """Blocks for bytes and arithmetic, rising. They are counted by shapes alone, so that no depth is too deep."""
    time_depths: Sequence[int] = (4, 16)
    """Blocks for times, rising."""
    num_rounds: int = 5
    """Timed steps of each technique."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where times are measured."""

    def __post_init__(self) -> None:
        for name, depths in (("memory_depths", self.memory_depths), ("time_depths", self.time_depths)):
            if any(depth < 1 for depth in depths) or list(depths) != sorted(set(depths)):
                raise ValueError(f"`{name}` (={list(depths)}) must be positive and rise, such as [4, 16].")
        if len(self.memory_depths) < 2:
            raise ValueError(f"`memory_depths` (={list(self.memory_depths)}) must be two or more, to see growth.")
        if self.num_rounds < 1:
            raise ValueError(f"`num_rounds` (={self.num_rounds}) must be 1 or more; 5 is usual.")


QUICK_COMPLEXITY = ComplexitySettings(memory_depths=(4, 16), time_depths=(4,), num_rounds=3)
"""For a look, in some seconds."""


@dataclass(frozen=True)
class Cost:
    """What one step of one technique takes."""

    contender: str
    depth: int
    peak_bytes: int
    """Most bytes alive at once, beyond parameters, their gradients, buffers and the input."""
    held_bytes: int
    """Those alive between the forward and the backward pass."""
    flops: int
    """Of the forward and the backward pass, two for each multiply-add."""


@dataclass(frozen=True)
class Complexity:
    """All that was measured."""

    settings: ComplexitySettings
    costs: Sequence[Cost]
    times: Sequence[TimeRow]

    def costs_of(self, technique: Technique) -> list[Cost]:
        """Those of one technique, by depth."""
        return [cost for cost in self.costs if cost.contender == technique.contender]

    def times_of(self, technique: Technique) -> list[TimeRow]:
        """Those of one technique, by depth."""
        return [row for row in self.times if row.contender == technique.contender]


def measure_complexity(settings: ComplexitySettings, say: Callable[[str], None] = print) -> Complexity:
    """Count bytes and arithmetic of all techniques at all depths, and time their steps, interleaved.

    Args:
        settings: How much, and where.
        say: Is told each result as it comes.
    """
    costs, times = [], []
    with torch.random.fork_rng(devices=[]):  # the workload seeds PyTorch's random state
        for depth in settings.memory_depths:
            for cost in _costs(settings.case, depth):
                costs.append(cost)
                say(f"{depth} blocks, {cost.contender}: {format_bytes(cost.peak_bytes)}, {cost.flops:.3e} FLOPs")
        for depth in settings.time_depths:
            only = Settings(time_depth=depth, num_rounds=settings.num_rounds, device=settings.device)
            rows, _ = measure_times(settings.case, only, _contenders())
            for row in rows:
                times.append(row)
                ratio = row.note if row.times is None else f"{row.times.over_plain.median:.2f} of plain's"
                say(f"{depth} blocks, {row.contender}: step time {ratio}")
    return Complexity(settings, costs, times)


def growth_exponent(depths: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log value against log depth: 1 where the value grows as the depth does, 0 where it does not grow.

    Args:
        depths: Two or more.
        values: One for each depth.
    """
    return statistics.linear_regression([*map(math.log, depths)], [*map(math.log, values)]).slope


def _contenders() -> list[Contender]:
    by_name = {contender.name: contender for contender in CONTENDERS}
    return [by_name[technique.contender] for technique in TECHNIQUES]


def _costs(case: Case, depth: int) -> Iterator[Cost]:
    device = torch.device("meta")  # shapes only: nothing is allocated or computed, and the bytes are the same
    functions = case.functions(depth, device)
    for contender in _contenders():
        module = contender.make(functions, case.split_dim)
        x = torch.cat(case.streams(1), case.split_dim).to(device).requires_grad_()  # as a stem's output does
        with FlopCounter() as counter:
            memory = measure(module, x)
        yield Cost(contender.name, depth, memory.activation_bytes, memory.held_bytes, counter.flops)
