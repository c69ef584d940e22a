"""A part of `gpu.py`: training steps in a CUDA graph, next to eager steps."""

import copy
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from _gpu_nets import OPTIMIZER, inputs_of, loss_of, make
from _gpu_part import Part, Setting
from _gpu_step import Turn, attempt, median_ratio, release, take_turns, watch
from _memory_page import Row, mib, table
from torch import Tensor, nn

from revnet import AbstractPolicy, Checkpoint, Reverse, ReversibleBlock, Store, set_policy

SECONDS = 6.0
"""Time for the rounds of one network."""
NUM_WARMUPS, NUM_COMPARED = 3, 5
"""Number of eager steps before a capture, and of steps that are compared."""
DROPOUT = 0.1
TWIN = "Store(), eager"
POLICIES: Sequence[AbstractPolicy] = (Reverse(), Checkpoint(), Store())


class Network(NamedTuple):
    """A network whose steps are captured."""

    title: str
    name: str
    size: int
    """Number of images or tokens."""
    has_dropout: bool


NETWORKS = (
    Network("RevNet-38", "revnet38", 100, has_dropout=False),
    Network("RevNet-38 with dropout", "revnet38", 100, has_dropout=True),
    Network("transformer with dropout", "transformer", 1024, has_dropout=True),
)
QUICK_NETWORKS = (
    Network("tiny revnet with dropout", "tiny revnet", 2, has_dropout=True),
    Network("tiny transformer with dropout", "tiny transformer", 16, has_dropout=True),
)


class Step:
    """A training step on inputs that stay in place, as a CUDA graph needs them.

    Args:
        model: The network.
        x: Its input.
    """

    def __init__(self, model: nn.Module, x: Tensor):
        self.model, self.x, self.optimizer = model, x, OPTIMIZER(model.parameters())

    def __call__(self) -> None:
        """Run an eager step."""
        self.optimizer.zero_grad()
        self.compute()

    def compute(self) -> None:
        """Run the step, except that no gradients are cleared: a graph writes them to the same memory each time."""
        loss_of(self.model(self.x)).backward()
        self.optimizer.step()

    def values(self) -> list[Tensor]:
        """Return the parameters, their gradients and the buffers."""
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return [*self.model.parameters(), *grads, *self.model.buffers()]

    def warm_up(self) -> None:
        """Run eager steps on a stream of their own, as a capture needs."""
        if not self.x.is_cuda:
            self._run_seeded()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run_seeded()
        torch.cuda.current_stream().wait_stream(stream)

    def _run_seeded(self) -> None:
        for seed in range(NUM_WARMUPS):
            torch.manual_seed(seed)
            self()

    def capture(self) -> Callable[[], None]:
        """Return a function that runs the step by a CUDA graph; on a CPU, an eager step."""
        if not self.x.is_cuda:
            return self
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.compute()
        return graph.replay


def rows(setting: Setting) -> Iterator[Row]:
    """Measure each network."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for network in QUICK_NETWORKS if setting.quick else NETWORKS:
        yield from _measure(network, setting)
        release(setting.device)


def _measure(network: Network, setting: Setting) -> Iterator[Row]:
    torch.manual_seed(0)
    model = make(network.name)
    if network.has_dropout:
        add_dropout(model)
    x = inputs_of(network.name, network.size).to(setting.device)
    steps: dict[str, Callable[[], object]] = {}
    known: dict[str, Row] = {}
    for policy in POLICIES:
        own = _with_policy(model, policy).to(setting.device)
        differences: dict[str, str] = {}
        runs: dict[str, Callable[[], None]] = {}

        def prepare(own: nn.Module = own, differences: dict = differences, runs: dict = runs) -> None:
            with deterministic():
                differences["captured"], differences["eager"] = compare(own, x)
            for mode in ("eager", "captured"):
                step = Step(copy.deepcopy(own), x)
                step.warm_up()
                runs[mode] = step if mode == "eager" else step.capture()

        note = attempt(prepare, setting.device)
        for mode in ("eager", "captured"):
            name = f"{policy}, {mode}"
            known[name] = {"note": note, "difference": differences.get(mode, ""), "grown_bytes": None}
            if not note:
                known[name]["grown_bytes"] = watch(runs[mode], setting.device).grown_bytes
                steps[name] = runs[mode]
    turns = take_turns(steps, setting, seconds=SECONDS)
    for name, row in known.items():
        yield {"network": network.title, "step": name, **_times(turns, name), **row}


class Dropped(nn.Module):
    """A residual function with a dropout at its end."""

    def __init__(self, function: nn.Module):
        super().__init__()
        self.function, self.dropout = function, nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the residual of `x`."""
        return self.dropout(self.function(x, *args, **kwargs))


def add_dropout(model: nn.Module) -> None:
    """Put a dropout after each residual function."""
    for module in list(model.modules()):
        if isinstance(module, ReversibleBlock):
            module.f, module.g = Dropped(module.f), Dropped(module.g)


def _with_policy(model: nn.Module, policy: AbstractPolicy) -> nn.Module:
    own = copy.deepcopy(model)
    set_policy(own, policy)
    return own


@contextmanager
def deterministic() -> Iterator[None]:
    """Use deterministic algorithms, where there are any."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def compare(model: nn.Module, x: Tensor) -> tuple[str, str]:
    """Compare captured and eager steps, and two runs of eager steps.

    Returns:
        The largest difference of a parameter, a gradient or a buffer after any step, as text; "none" if all bits are
        equal.
    """
    first, second, own = (Step(copy.deepcopy(model), x) for _ in range(3))
    for step in (first, second, own):
        step.warm_up()
    replay = own.capture()
    largest = [0.0, 0.0]
    for seed in range(100, 100 + NUM_COMPARED):
        for run in (first, second, replay):
            torch.manual_seed(seed)
            run()
        for index, other in enumerate((own, second)):
            for a, b in zip(other.values(), first.values(), strict=True):
                if not torch.equal(a, b):
                    difference = (a.double() - b.double()).abs().max().item() if a.is_floating_point() else 1.0
                    largest[index] = max(largest[index], difference)
    captured, eager = (f"{difference:.1e}" if difference else "none" for difference in largest)
    return captured, eager


def _times(turns: dict[str, list[Turn]], name: str) -> Row:
    if name not in turns:
        return {"step_ms": None, "host_ms": None, "ratio": None, "captured_ratio": None}
    seconds = [turn.step_seconds for turn in turns[name]]
    ratios = []
    for twin in (TWIN, TWIN.replace("eager", "captured")):
        reference = [turn.step_seconds for turn in turns.get(twin, [])]
        ratios.append(median_ratio(seconds, reference) if reference else None)
    return {
        "step_ms": 1e3 * statistics.median(seconds),
        "host_ms": 1e3 * statistics.median([turn.host_seconds for turn in turns[name]]),
        "ratio": ratios[0],
        "captured_ratio": ratios[1],
    }


def lines(rows_of_part: Sequence[Row]) -> list[str]:
    """Return the lines of the table."""
    columns = (
        "network",
        "step",
        "difference",
        "step, ms",
        "step / twin",
        "step / captured twin",
        "host, ms",
        "peak, MiB",
    )
    return [
        "Training steps with SGD and momentum in float32. A captured step is one CUDA graph: forward pass, backward",
        f"pass and update, after {NUM_WARMUPS} eager steps. *Difference*: the largest difference of a parameter, a",
        f"gradient or a buffer in {NUM_COMPARED} steps with the same random numbers and deterministic algorithms: of",
        "captured steps from eager ones, and of eager steps from another run of them. *Twin*: the network with",
        "`Store()`. *Peak*: the peak of allocated memory minus the memory before the step, which includes a graph's.",
        "",
        *table(columns, [_cells(row) for row in rows_of_part]),
    ]


def _cells(row: Row) -> list[str]:
    if row["note"] or row["step_ms"] is None:
        return [row["network"], f"`{row['step']}`", row["note"], "", "", "", "", ""]
    ratios = ["" if row[name] is None else f"{row[name]:.2f}" for name in ("ratio", "captured_ratio")]
    start = [row["network"], f"`{row['step']}`", row["difference"], f"{row['step_ms']:.2f}"]
    return [*start, *ratios, f"{row['host_ms']:.2f}", mib(row["grown_bytes"])]


CAPTURE = Part("capture", "Steps in a CUDA graph", 70, rows, lines)
