"""Processor time of a step on the host, with tensors so small that their arithmetic hardly matters.

A GPU runs the kernels of a small network faster than the host can launch them, so there the host's time decides how
fast the network trains.
"""

import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from revnet.bench.calls import Calls, count_calls
from revnet.bench.cases import Case, FunctionPair
from revnet.bench.host_cases import HOST_CASES, HOST_METHODS, LOOP
from revnet.bench.methods import Method, is_missing, report_missing
from revnet.bench.pitfalls import one_line
from revnet.bench.run import Quartiles

NUM_BLOCKS = 16
NUM_ROUNDS = 101
NUM_QUICK_ROUNDS = 11
STEPS_PER_TURN = 2
"""Number of steps timed together. One step runs before them, to bring the method's code into the caches."""


class HostRunner:
    """A method applied to a case, ready to run training steps on one thread.

    Args:
        method: Way of running the blocks.
        case: Workload.
        functions: Residual functions, shared with the other methods.
    """

    def __init__(self, method: Method, case: Case, functions: Sequence[FunctionPair]):
        self.module = method.make(functions, case.split_dim)
        self.parameters = [parameter for pair in functions for function in pair for parameter in function.parameters()]
        self._x = torch.cat(case.streams(1), case.split_dim)

    def inputs(self, number: int) -> list[Tensor]:
        """Return copies of the input that require a gradient. They are copies, because memcnn overwrites its input."""
        return [self._x.clone().requires_grad_() for _ in range(number)]

    def step(self, x: Tensor) -> None:
        """Run the forward pass, the loss and the backward pass."""
        self.module(x).square().mean().backward()

    def clear_gradients(self) -> None:
        """Drop the gradients of earlier steps."""
        for parameter in self.parameters:
            parameter.grad = None

    def count_calls(self) -> Calls:
        """Return the Python calls inside revnet during the second step."""
        first, second = self.inputs(2)
        self.step(first)
        return count_calls(lambda: self.step(second))

    def turn_seconds(self) -> float:
        """Return the processor time per step, averaged over `STEPS_PER_TURN` steps."""
        self.clear_gradients()
        first, *others = self.inputs(1 + STEPS_PER_TURN)
        gc.collect()  # so that a method does not pay for collecting another one's garbage
        self.step(first)
        start = time.process_time()
        for x in others:
            self.step(x)
        return (time.process_time() - start) / STEPS_PER_TURN


@dataclass(frozen=True)
class HostTimes:
    """Processor time of steps, and its ratio to plain autograd."""

    step_seconds: float
    """Median over rounds."""
    over_plain: Quartiles
    """Ratio to the plain step of the same round."""
    least_over_least: float
    """Ratio of the fastest step to the fastest plain step, which other programs disturbed least."""

    @classmethod
    def of(cls, steps: Sequence[float], plain: Sequence[float]) -> "HostTimes":
        """Compare steps with the plain steps of the same rounds."""
        return cls(
            step_seconds=statistics.median(steps),
            over_plain=Quartiles.of([step / reference for step, reference in zip(steps, plain, strict=True)]),
            least_over_least=min(steps) / min(plain),
        )


@dataclass(frozen=True)
class HostRow:
    """Cost of one method on one case."""

    case: str
    method: str
    times: HostTimes | None = None
    calls: Calls | None = None
    """Python calls inside revnet in one step."""
    note: str = ""
    """Reason for a missing measurement."""


@dataclass
class HostResults:
    """All measurements."""

    num_rounds: int
    num_blocks: int
    rows: list[HostRow] = field(default_factory=list)

    @property
    def num_half_blocks(self) -> int:
        """Number of residual functions."""
        return 2 * self.num_blocks

    def microseconds(self, times: HostTimes) -> float:
        """Return the processor time per half-block."""
        return times.step_seconds / self.num_half_blocks * 1e6


def measure_host(num_rounds: int, say: Callable[[str], None] = print, *, num_blocks: int = NUM_BLOCKS) -> HostResults:
    """Measure the processor time of a step of every method on every case, interleaved in this process.

    Args:
        num_rounds: Number of turns of each method. The order changes with each round, since a method inherits the
            caches from the one before it.
        say: Function that receives a line for each result.
        num_blocks: Number of blocks.
    """
    results = HostResults(num_rounds, num_blocks)
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore")  # PyTorch warns about old code in the other libraries
        report_missing(HOST_METHODS, say)
        for case in HOST_CASES:
            for row in _measure_case(case, num_rounds, num_blocks):
                results.rows.append(row)
                if row.times is not None:
                    say(f"{case.name}, {row.method}: {row.times.over_plain.median:.2f} times plain's processor time")
                elif not is_missing(row.note):
                    say(f"{case.name}, {row.method}: {row.note}")
    return results


def _measure_case(case: Case, num_rounds: int, num_blocks: int) -> Iterator[HostRow]:
    functions = case.functions(num_blocks, torch.device("cpu"))
    runners: dict[str, HostRunner] = {}
    notes: dict[str, str] = {}
    for method in HOST_METHODS:
        if note := method.missing():
            notes[method.name] = note
            continue
        try:
            runner = HostRunner(method, case, functions)
            runner.turn_seconds()
            runners[method.name] = runner
        except Exception as error:
            notes[method.name] = one_line(error)
    with frozen():
        seconds = _rounds(runners, num_rounds)
        calls = {name: runner.count_calls() for name, runner in runners.items()}
    for method in HOST_METHODS:
        name = method.name
        if name in notes:
            yield HostRow(case.name, name, note=notes[name])
        else:
            yield HostRow(case.name, name, HostTimes.of(seconds[name], seconds[LOOP.name]), calls[name])


def _rounds(runners: dict[str, HostRunner], num_rounds: int) -> dict[str, list[float]]:
    """Return the processor time of a step of each runner, one per round."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    shuffle = random.Random(0).shuffle  # a separate generator, since revtorch draws from the global one
    for _ in range(num_rounds):
        names = list(runners)
        shuffle(names)
        for name in names:
            seconds[name].append(runners[name].turn_seconds())
    return seconds


@contextmanager
def frozen() -> Iterator[None]:
    """Exclude existing objects from garbage collection, so that the collections between turns are fast."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute on one thread, so that processor time is the time of a step."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
