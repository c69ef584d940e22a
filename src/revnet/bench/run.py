"""Measure all contenders on all cases, interleaved in one process."""

import gc
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from revnet.bench._isolated import check_isolated
from revnet.bench._step import Subject, gradient_error
from revnet.bench.cases import CASES, Case
from revnet.bench.contenders import CONTENDERS, PLAIN, Contender
from revnet.bench.traps import TRAPS, one_line
from revnet.memory import format_bytes


@dataclass(frozen=True)
class Settings:
    """How much to measure."""

    memory_depths: Sequence[int] = (4, 16, 64, 256)
    """Blocks of the memory measurements."""
    time_depth: int = 16
    """Blocks of the time measurements; one of the memory depths."""
    num_rounds: int = 15
    """Steps of each contender that are timed."""
    slow_traps: bool = True
    """Whether to run the traps that take seconds: those that compile."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where memory and time are measured. Traps always run on CPU."""


QUICK = Settings(memory_depths=(2, 4), time_depth=4, num_rounds=3, slow_traps=False)
"""For a look, in about a minute."""

NUM_WARMUP_ROUNDS = 1


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one step, beyond parameters, gradients, buffers and the input."""

    case: str
    depth: int
    contender: str
    peak_bytes: int | None = None
    held_bytes: int | None = None
    """Between the forward and the backward pass."""
    note: str = ""
    """Why there is no measurement."""


@dataclass(frozen=True)
class Quartiles:
    """The middle of a list of numbers, and its spread."""

    first: float
    median: float
    third: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """Of one number or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Times:
    """Seconds of steps, and what they are in relation to plain autograd's of the same round."""

    step_seconds: float
    """Median."""
    over_plain: Quartiles
    """Step over plain step, by rounds."""
    median_over_plain_median: float
    over_ideal: Quartiles
    """Step over plain step and plain forward, by rounds."""


@dataclass(frozen=True)
class TimeRow:
    """Time and accuracy of one contender."""

    case: str
    depth: int
    contender: str
    times: Times | None = None
    error_to_plain: float | None = None
    """Largest relative L2 distance of a parameter's gradient to plain autograd's."""
    error_to_float64: float | None = None
    """The same to plain autograd's in float64, which plain autograd in float32 does not meet either."""
    note: str = ""


@dataclass(frozen=True)
class TrapRow:
    """How one contender fared in one trap."""

    trap: str
    contender: str
    outcome: str
    """ok, wrong, raises or crashes; empty where it has not run."""
    note: str = ""


@dataclass
class Results:
    """All that was measured."""

    settings: Settings
    memory: list[MemoryRow] = field(default_factory=list)
    times: list[TimeRow] = field(default_factory=list)
    forward_seconds: dict[str, float] = field(default_factory=dict)
    """By case: the median forward pass of plain autograd, under `torch.no_grad`."""
    traps: list[TrapRow] = field(default_factory=list)


def measure_all(settings: Settings, say: Callable[[str], None] = print) -> Results:
    """Measure memory, time and gradients of all cases, then the traps.

    Args:
        settings: How much, and where.
        say: Is told each result as it comes.
    """
    results = Results(settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PyTorch has to say to the peers' old code
        for case in CASES:
            _measure_case(case, results, say)
        _measure_traps(results, say)
    return results


def _measure_case(case: Case, results: Results, say: Callable[[str], None]) -> None:
    settings = results.settings
    for depth in settings.memory_depths:
        for memory_row in measure_memory(case, depth, settings.device):
            results.memory.append(memory_row)
            peak = memory_row.note if memory_row.peak_bytes is None else format_bytes(memory_row.peak_bytes)
            say(f"{case.name}, {depth} blocks, {memory_row.contender}: {peak}")
    time_rows, results.forward_seconds[case.name] = measure_times(case, settings)
    for time_row in time_rows:
        results.times.append(time_row)
        ratio = time_row.note if time_row.times is None else f"{time_row.times.over_plain.median:.3f} of plain's"
        say(f"{case.name}, {settings.time_depth} blocks, {time_row.contender}: step time {ratio}")


def _measure_traps(results: Results, say: Callable[[str], None]) -> None:
    for trap in TRAPS:
        for contender in CONTENDERS:
            note = contender.missing() or ("not run" if trap.is_slow and not results.settings.slow_traps else "")
            outcome, note = ("", note) if note else check_isolated(trap, contender)
            results.traps.append(TrapRow(trap.name, contender.name, outcome, note))
            say(f"{trap.name}, {contender.name}: {outcome or note}")


def measure_memory(case: Case, depth: int, device: torch.device) -> Iterator[MemoryRow]:
    """The bytes of one step of each contender, as they come."""
    functions = case.functions(depth, device)
    for contender in CONTENDERS:
        note = contender.missing() or _too_deep(contender, depth)
        if note:
            yield MemoryRow(case.name, depth, contender.name, note=note)
            continue
        try:
            memory = Subject(contender, case, functions, device).memory()
            row = MemoryRow(case.name, depth, contender.name, memory.peak_bytes, memory.held_bytes)
        except Exception as error:
            row = MemoryRow(case.name, depth, contender.name, note=one_line(error))
        gc.collect()
        yield row


def measure_times(
    case: Case, settings: Settings, contenders: Sequence[Contender] | None = None
) -> tuple[list[TimeRow], float]:
    """Step times of all contenders, in rounds; and the median forward time of plain autograd.

    Each round measures plain autograd's forward pass and a step of each contender, beginning with another one each
    time, so that whatever disturbs the machine for a while meets them all.

    Args:
        case: The workload.
        settings: The depth, the rounds and the device.
        contenders: Some of `CONTENDERS`, `PLAIN` among them; all if None.
    """
    contenders = CONTENDERS if contenders is None else contenders
    device, depth = settings.device, settings.time_depth
    functions = case.functions(depth, device)
    subjects: dict[str, Subject] = {}
    errors: dict[str, tuple[float, float]] = {}
    notes: dict[str, str] = {}
    exact = _float64_gradients(case, depth, device)
    expected = Subject(PLAIN, case, functions, device).gradients()
    for contender in contenders:
        if note := contender.missing():
            notes[contender.name] = note
            continue
        try:
            subject = Subject(contender, case, functions, device)
            gradients = subject.gradients()
            errors[contender.name] = gradient_error(gradients, expected), gradient_error(gradients, exact)
            subjects[contender.name] = subject
        except Exception as error:
            notes[contender.name] = one_line(error)
    seconds, forward_seconds = _rounds(subjects, settings.num_rounds)
    rows = []
    for contender in contenders:
        name = contender.name
        if name in seconds:
            times = _compare(seconds[name], seconds[PLAIN.name], forward_seconds)
            rows.append(TimeRow(case.name, depth, name, times, *errors[name]))
        else:
            rows.append(TimeRow(case.name, depth, name, note=notes[name]))
    return rows, statistics.median(forward_seconds)


def _rounds(subjects: dict[str, Subject], num_rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each subject's steps, and of plain autograd's forward passes, by rounds."""
    names = list(subjects)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    forward_seconds = []
    for index in range(num_rounds + NUM_WARMUP_ROUNDS):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            if name == PLAIN.name:
                forward_seconds.append(subjects[name].forward_seconds())
            seconds[name].append(subjects[name].step_seconds())
    return {name: values[NUM_WARMUP_ROUNDS:] for name, values in seconds.items()}, forward_seconds[NUM_WARMUP_ROUNDS:]


def _compare(steps: Sequence[float], plain: Sequence[float], forward: Sequence[float]) -> Times:
    return Times(
        step_seconds=statistics.median(steps),
        over_plain=Quartiles.of([step / reference for step, reference in zip(steps, plain, strict=True)]),
        median_over_plain_median=statistics.median(steps) / statistics.median(plain),
        over_ideal=Quartiles.of([step / (a + b) for step, a, b in zip(steps, plain, forward, strict=True)]),
    )


def _float64_gradients(case: Case, depth: int, device: torch.device) -> list[torch.Tensor]:
    functions = [(f.double(), g.double()) for f, g in case.functions(depth, device)]
    return Subject(PLAIN, case, functions, device, torch.float64).gradients()


def _too_deep(contender: Contender, depth: int) -> str:
    return "not run" if contender.max_depth is not None and depth > contender.max_depth else ""
