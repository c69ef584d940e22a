"""What a step costs on the host: processor time on tensors so small that their arithmetic hardly counts.

A GPU computes the kernels of a small network in less time than it takes to launch them, so there this is what decides
how fast the network trains.
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
from revnet.bench.contenders import Contender
from revnet.bench.host_cases import HOST_CASES, HOST_CONTENDERS, LOOP
from revnet.bench.run import Quartiles
from revnet.bench.traps import one_line

NUM_BLOCKS = 16
NUM_ROUNDS = 101
NUM_QUICK_ROUNDS = 11
STEPS_PER_TURN = 2
"""Steps that are timed together, after one that is not: it brings the contender's code back into the caches."""


class HostSubject:
    """A contender on a case, ready to step on one thread.

    Args:
        contender: The way of running.
        case: The workload.
        functions: The residual functions, shared with the other contenders.
    """

    def __init__(self, contender: Contender, case: Case, functions: Sequence[FunctionPair]):
        self.module = contender.make(functions, case.split_dim)
        self.parameters = [parameter for pair in functions for function in pair for parameter in function.parameters()]
        self._x = torch.cat(case.streams(1), case.split_dim)

    def inputs(self, number: int) -> list[Tensor]:
        """Return copies of the input that require a gradient; memcnn overwrites what it gets."""
        return [self._x.clone().requires_grad_() for _ in range(number)]

    def step(self, x: Tensor) -> None:
        """Run the forward pass, the loss and the backward pass."""
        self.module(x).square().mean().backward()

    def clear_gradients(self) -> None:
        """Drop the gradients of earlier steps."""
        for parameter in self.parameters:
            parameter.grad = None

    def count_calls(self) -> Calls:
        """Return the Python calls inside revnet in one step, which is not the first."""
        first, second = self.inputs(2)
        self.step(first)
        return count_calls(lambda: self.step(second))

    def turn_seconds(self) -> float:
        """Return the processor time of one step, of `STEPS_PER_TURN` timed together."""
        self.clear_gradients()
        first, *others = self.inputs(1 + STEPS_PER_TURN)
        gc.collect()  # nobody pays for what another contender left behind
        self.step(first)
        start = time.process_time()
        for x in others:
            self.step(x)
        return (time.process_time() - start) / STEPS_PER_TURN


@dataclass(frozen=True)
class HostTimes:
    """Processor time of steps, and what it is in relation to plain autograd's."""

    step_seconds: float
    """Median."""
    over_plain: Quartiles
    """Step over plain step of the same round."""
    least_over_least: float
    """Fastest step over fastest plain step: both at the moment when other programs disturbed them least."""

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
    """The cost of one contender on one case."""

    case: str
    contender: str
    times: HostTimes | None = None
    calls: Calls | None = None
    """Python calls inside revnet in one step."""
    note: str = ""
    """Why there is no measurement."""


@dataclass
class HostResults:
    """All that was measured."""

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
    """Measure the processor time of a step of every contender on every case, interleaved in this process.

    Args:
        num_rounds: Turns of each contender. Each round has another order, since a contender finds the caches as the
            one before it left them.
        say: Called with each result.
        num_blocks: Depth of the network.
    """
    results = HostResults(num_rounds, num_blocks)
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore")  # what PyTorch has to say to the peers' old code
        for case in HOST_CASES:
            for row in _measure_case(case, num_rounds, num_blocks):
                results.rows.append(row)
                told = row.note if row.times is None else f"{row.times.over_plain.median:.2f} of plain's processor time"
                say(f"{case.name}, {row.contender}: {told}")
    return results


def _measure_case(case: Case, num_rounds: int, num_blocks: int) -> Iterator[HostRow]:
    functions = case.functions(num_blocks, torch.device("cpu"))
    subjects: dict[str, HostSubject] = {}
    notes: dict[str, str] = {}
    for contender in HOST_CONTENDERS:
        if note := contender.missing():
            notes[contender.name] = note
            continue
        try:
            subject = HostSubject(contender, case, functions)
            subject.turn_seconds()
            subjects[contender.name] = subject
        except Exception as error:
            notes[contender.name] = one_line(error)
    with frozen():
        seconds = _rounds(subjects, num_rounds)
        calls = {name: subject.count_calls() for name, subject in subjects.items()}
    for contender in HOST_CONTENDERS:
        name = contender.name
        if name in notes:
            yield HostRow(case.name, name, note=notes[name])
        else:
            yield HostRow(case.name, name, HostTimes.of(seconds[name], seconds[LOOP.name]), calls[name])


def _rounds(subjects: dict[str, HostSubject], num_rounds: int) -> dict[str, list[float]]:
    """Processor time of a step of each subject, by rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    shuffle = random.Random(0).shuffle  # a generator of its own: revtorch draws from the global one
    for _ in range(num_rounds):
        names = list(subjects)
        shuffle(names)
        for name in names:
            seconds[name].append(subjects[name].turn_seconds())
    return seconds


@contextmanager
def frozen() -> Iterator[None]:
    """Keep what is there already out of garbage collections: those between turns then cost next to nothing."""
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
