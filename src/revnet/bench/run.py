"""Measure all methods on all cases, interleaved in one process."""

import gc
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from revnet.bench._isolated import check_isolated
from revnet.bench._runner import Runner, gradient_error
from revnet.bench.cases import CASES, Case
from revnet.bench.methods import METHODS, PLAIN, Method, is_missing, report_missing
from revnet.bench.pitfalls import PITFALLS, one_line
from revnet.memory import format_bytes


@dataclass(frozen=True)
class Settings:
    """Number of measurements, and the device."""

    memory_depths: Sequence[int] = (4, 16, 64, 256)
    """Numbers of blocks for the memory measurements."""
    time_depth: int = 16
    """Number of blocks for the time measurements, one of the memory depths."""
    num_rounds: int = 15
    """Number of timed steps per method."""
    slow_pitfalls: bool = True
    """Whether to run the pitfalls with `torch.compile`, which take seconds."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device for memory and time. Pitfalls always run on the CPU."""


QUICK = Settings(memory_depths=(2, 4), time_depth=4, num_rounds=3, slow_pitfalls=False)
"""Settings for a quick comparison, which takes about a minute."""

NUM_WARMUP_ROUNDS = 1


@dataclass(frozen=True)
class MemoryRow:
    """Memory of one step, not counting parameters, gradients, buffers and the input."""

    case: str
    depth: int
    method: str
    peak_bytes: int | None = None
    held_bytes: int | None = None
    """Bytes alive between the forward and the backward pass."""
    note: str = ""
    """Reason for a missing measurement."""


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of a list of numbers."""

    first: float
    median: float
    third: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """Return the quartiles of one or more numbers."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Times:
    """Step times, and their ratios to plain autograd in the same round."""

    step_seconds: float
    """Median time of a step over all rounds."""
    over_plain: Quartiles
    """Ratio to the plain step of the same round."""
    median_over_plain_median: float
    over_ideal: Quartiles
    """Ratio to the plain step plus the plain forward pass of the same round."""


@dataclass(frozen=True)
class TimeRow:
    """Time and accuracy of one method."""

    case: str
    depth: int
    method: str
    times: Times | None = None
    error_to_plain: float | None = None
    """Largest relative L2 distance of a parameter's gradient from plain autograd."""
    error_to_float64: float | None = None
    """Largest distance from plain autograd in float64. Plain autograd in float32 has such an error too."""
    note: str = ""


@dataclass(frozen=True)
class PitfallRow:
    """Outcome of one pitfall with one method."""

    pitfall: str
    method: str
    outcome: str
    """ok, wrong, raises or crashes; empty if it was not run."""
    note: str = ""


@dataclass
class Results:
    """All measurements."""

    settings: Settings
    memory: list[MemoryRow] = field(default_factory=list)
    times: list[TimeRow] = field(default_factory=list)
    forward_seconds: dict[str, float] = field(default_factory=dict)
    """Median time of a plain forward pass under `torch.no_grad`, by case."""
    pitfalls: list[PitfallRow] = field(default_factory=list)


def measure_all(settings: Settings, say: Callable[[str], None] = print) -> Results:
    """Measure memory, time and gradients of all cases, then run the pitfalls.

    Args:
        settings: Number of measurements, and the device.
        say: Function that receives a line for each result.
    """
    results = Results(settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns about old code in the other libraries
        report_missing(METHODS, say)
        for case in CASES:
            _measure_case(case, results, say)
        _measure_pitfalls(results, say)
    return results


def _measure_case(case: Case, results: Results, say: Callable[[str], None]) -> None:
    settings = results.settings
    for depth in settings.memory_depths:
        for memory_row in measure_memory(case, depth, settings.device):
            results.memory.append(memory_row)
            if not is_missing(memory_row.note):
                peak = memory_row.note if memory_row.peak_bytes is None else format_bytes(memory_row.peak_bytes)
                say(f"{case.name}, {depth} blocks, {memory_row.method}: {peak}")
    time_rows, results.forward_seconds[case.name] = measure_times(case, settings)
    for time_row in time_rows:
        results.times.append(time_row)
        if not is_missing(time_row.note):
            ratio = time_row.note if time_row.times is None else f"{time_row.times.over_plain.median:.3f} times plain"
            say(f"{case.name}, {settings.time_depth} blocks, {time_row.method}: step time {ratio}")


def _measure_pitfalls(results: Results, say: Callable[[str], None]) -> None:
    for pitfall in PITFALLS:
        for method in METHODS:
            note = method.missing() or ("not run" if pitfall.is_slow and not results.settings.slow_pitfalls else "")
            outcome, note = ("", note) if note else check_isolated(pitfall, method)
            results.pitfalls.append(PitfallRow(pitfall.name, method.name, outcome, note))
            if not is_missing(note):
                say(f"{pitfall.name}, {method.name}: {outcome or note}")


def measure_memory(case: Case, depth: int, device: torch.device) -> Iterator[MemoryRow]:
    """Yield the memory of one step of each method."""
    functions = case.functions(depth, device)
    for method in METHODS:
        note = method.missing() or _too_deep(method, depth)
        if note:
            yield MemoryRow(case.name, depth, method.name, note=note)
            continue
        try:
            memory = Runner(method, case, functions, device).memory()
            row = MemoryRow(case.name, depth, method.name, memory.peak_bytes, memory.held_bytes)
        except Exception as error:
            row = MemoryRow(case.name, depth, method.name, note=one_line(error))
        gc.collect()
        yield row


def measure_times(
    case: Case, settings: Settings, methods: Sequence[Method] | None = None
) -> tuple[list[TimeRow], float]:
    """Return the step times of all methods, and the median forward time of plain autograd.

    Each round measures a forward pass of plain autograd and a step of each method. The first method changes with each
    round, so that a disturbance of the machine affects all methods.

    Args:
        case: Workload.
        settings: Depth, number of rounds and device.
        methods: Methods from `METHODS`, including `PLAIN`. None means all of them.
    """
    methods = METHODS if methods is None else methods
    device, depth = settings.device, settings.time_depth
    functions = case.functions(depth, device)
    runners: dict[str, Runner] = {}
    errors: dict[str, tuple[float, float]] = {}
    notes: dict[str, str] = {}
    exact = _float64_gradients(case, depth, device)
    expected = Runner(PLAIN, case, functions, device).gradients()
    for method in methods:
        if note := method.missing():
            notes[method.name] = note
            continue
        try:
            runner = Runner(method, case, functions, device)
            gradients = runner.gradients()
            errors[method.name] = gradient_error(gradients, expected), gradient_error(gradients, exact)
            runners[method.name] = runner
        except Exception as error:
            notes[method.name] = one_line(error)
    seconds, forward_seconds = _rounds(runners, settings.num_rounds)
    rows = []
    for method in methods:
        name = method.name
        if name in seconds:
            times = _compare(seconds[name], seconds[PLAIN.name], forward_seconds)
            rows.append(TimeRow(case.name, depth, name, times, *errors[name]))
        else:
            rows.append(TimeRow(case.name, depth, name, note=notes[name]))
    return rows, statistics.median(forward_seconds)


def _rounds(runners: dict[str, Runner], num_rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    """Return the times of each runner's steps and of plain forward passes, one per round."""
    names = list(runners)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    forward_seconds = []
    for index in range(num_rounds + NUM_WARMUP_ROUNDS):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            if name == PLAIN.name:
                forward_seconds.append(runners[name].forward_seconds())
            seconds[name].append(runners[name].step_seconds())
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
    return Runner(PLAIN, case, functions, device, torch.float64).gradients()


def _too_deep(method: Method, depth: int) -> str:
    return "not run" if method.max_depth is not None and depth > method.max_depth else ""
