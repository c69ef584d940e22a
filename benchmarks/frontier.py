"""Step time against memory between `Reverse()` and `Store()`, next to PyTorch's checkpoints and other libraries.

    python benchmarks/frontier.py
    python benchmarks/frontier.py --before FOLDER

Writes frontier_<hardware>_<date>.md, a CSV and a picture to benchmarks/results/. All variants of a workload run
interleaved in one process. `--before` names the checkout of an earlier commit; then steps of it and of this one run
in turns instead, and the page frontier-before_<hardware>_<date>.md compares them. `--plans` only writes the page
frontier-plans_<hardware>_<date>.md.
"""

import argparse
import ctypes
import datetime
import gc
import multiprocessing
import random
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _frontier_before import before_section, is_checkout
from _frontier_flops import flops_section
from _frontier_page import frontier_sections, plot_frontier
from _frontier_plans import plans_section
from _frontier_variants import OWN, PEERS, PYTORCH, STORED, WORKLOADS
from _memory_page import Row, table, write_csv
from torch import Tensor

from revnet._figure import check_matplotlib
from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.bench._runner import Runner
from revnet.bench.cases import Case, FunctionPair
from revnet.bench.host import frozen, one_thread
from revnet.bench.methods import Method
from revnet.bench.pitfalls import one_line
from revnet.bench.run import Quartiles
from revnet.memory import measure, predict

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
MALLOC_OPTIONS = {-4: 0, -1: 2**31 - 1}
"""No allocation by `mmap` (M_MMAP_MAX), and no return of freed memory to the system (M_TRIM_THRESHOLD)."""
PRECISIONS: Mapping[str, torch.dtype | None] = {"float32": None, "bf16 autocast": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """A workload in one precision."""

    workload: str
    precision: str

    @property
    def case(self) -> Case:
        """The workload."""
        return WORKLOADS[self.workload]

    @property
    def autocast(self) -> torch.dtype | None:
        """Data type of autocast; None for no autocast."""
        return PRECISIONS[self.precision]

    def variants(self) -> list[tuple[str, Method]]:
        """Return all variants with their families, the stored twin first."""
        name = self.workload
        variants = [("revnet", method) for method in (STORED, *OWN[name])]
        variants += [("torch.utils.checkpoint", method) for method in PYTORCH[name]]
        has_peers = self.precision == "float32" and name != "bottleneck"
        return variants + [("library", method) for method in PEERS if has_peers]


@dataclass
class Outcome:
    """Bytes and time of one variant."""

    num_bytes: int = 0
    """Largest number of bytes of activations in a step."""
    seconds: list[float] = field(default_factory=list)
    """Processor time of a step in each round."""
    note: str = ""
    """Reason for a missing measurement."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="names, with commas between them")
    parser.add_argument("--depth", type=int, default=16, help="blocks for the bytes")
    parser.add_argument("--time-depth", type=int, default=4, help="blocks for the time, a multiple of 4")
    parser.add_argument("--num-rounds", type=int, default=9)
    parser.add_argument("--plan-depth", type=int, default=8, help="blocks for the plans, for bytes and time")
    parser.add_argument("--plans", action="store_true", help="only measure plans")
    parser.add_argument(
        "--page-faults", action="store_true", help="let the C library return freed memory to the system"
    )
    parser.add_argument("--before", type=Path, help="only compare with this checkout of an earlier commit")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    names = given.workloads.split(",")
    if unknown := set(names) - set(WORKLOADS):
        parser.error(f"--workloads has the unknown name {min(unknown)}; the names are {', '.join(WORKLOADS)}")
    if (
        min(given.depth, given.time_depth, given.plan_depth, given.num_rounds) < 1
        or given.time_depth % 4
        or given.depth % 4
    ):
        parser.error("--depth and --time-depth must be multiples of 4, and --num-rounds at least 1")
    if not given.out_dir.is_dir():
        parser.error(f"--out-dir {given.out_dir} is not a folder; create it first")
    if given.before is not None and not is_checkout(given.before):
        parser.error(f"--before {given.before} is not a checkout of revnet")
    command = shlex.join(["python", "benchmarks/frontier.py", *arguments])
    with one_thread():
        if given.before is not None:
            page = ["# Steps before and after", "", *describe_machine(command), ""]
            page += before_section(given.before, 5 * given.num_rounds)
            write_page(page, given.out_dir / f"frontier-before_{hardware_name()}_{datetime.date.today()}.md")
            return
        settings = [Setting(name, precision) for name in names for precision in PRECISIONS]
        if given.plans:
            keep_freed_memory()
            page = ["# Time and memory of plans", "", *describe_machine(command), ""]
            page += plans_section(settings, given.plan_depth, given.num_rounds, time_in_turns)
            write_page(page, given.out_dir / f"frontier-plans_{hardware_name()}_{datetime.date.today()}.md")
            return
        check_matplotlib()
        has_faults = given.page_faults or not keep_freed_memory()
        stem = f"frontier{'-page-faults' * given.page_faults}_{hardware_name()}_{datetime.date.today()}"
        rows = measure_all(settings, given.depth, given.time_depth, given.num_rounds)
        write_csv(rows, given.out_dir / f"{stem}.csv")
        plot_frontier(rows, given.out_dir / f"{stem}.png")
        page = [
            "# Step time against memory",
            "",
            *describe_machine(command, peers={peer.package or "": peer.version() or "not installed" for peer in PEERS}),
            "",
            f"![{stem}.png]({stem}.png)",
            "",
            *explanation(names, given.depth, given.time_depth, given.num_rounds, has_faults=has_faults),
            *frontier_sections(rows),
            *plans_section(settings, given.plan_depth, given.num_rounds, time_in_turns),
            *depths_section(names[0], (given.time_depth, given.depth), given.num_rounds),
            *flops_section(names, given.time_depth),
            *variants_section([method for name in names for method in (*OWN[name], *PYTORCH[name])]),
        ]
        write_page(page, given.out_dir / f"{stem}.md")


def write_page(lines: Sequence[str], path: Path) -> None:
    """Write and print the page."""
    text = "\n".join(lines).rstrip() + "\n"
    path.write_text(text)
    print(text)


def keep_freed_memory() -> bool:
    """Let the C library keep all freed memory, so that later allocations cause no page faults. Return if it did."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(option, value) for option, value in MALLOC_OPTIONS.items())


def measure_all(settings: Sequence[Setting], depth: int, time_depth: int, num_rounds: int) -> list[Row]:
    """Return the rows of the CSV. Another process counts the bytes, which takes long and disturbs no processor time."""
    rows: list[Row] = []
    # Fork would copy locks that threads of PyTorch may hold.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(count_all, setting, depth) for setting in settings]
        for setting, future in zip(settings, futures, strict=True):
            methods = [method for _, method in setting.variants()]
            outcomes = time_in_turns(setting, methods, time_depth, num_rounds)
            for outcome, (num_bytes, note) in zip(outcomes, future.result(), strict=True):
                outcome.num_bytes, outcome.note = num_bytes, outcome.note or note
            rows += rows_of(setting, outcomes)
    return rows


def explanation(names: Sequence[str], depth: int, time_depth: int, num_rounds: int, *, has_faults: bool) -> list[str]:
    """Return the lines that say what was measured."""
    faults = [
        "The C library returns freed memory to the system, as by default. So the stored twin, which allocates and",
        "frees most, pays most for page faults.",
    ]
    no_faults = [
        "The C library keeps freed memory, so that no variant pays for page faults. By default, the stored twin, which",
        "allocates and frees most, pays most for them, and the ratios are smaller (`--page-faults`).",
    ]
    return [
        "The workloads are the ones of `revnet bench`, and bottlenecks:",
        "",
        *[f"- {name}: {WORKLOADS[name].description}" for name in names],
        "",
        f"Bytes are the peak of activations and their gradients in a step at {depth} blocks, counted by",
        "`revnet.memory.measure`; every count equals the prediction of `revnet.memory.predict`. Parameters, their",
        "gradients and the input are not counted. One step runs before the count: under autocast, the first step may",
        "check a function by running it again. The peaks of other libraries are counted by `revnet bench`.",
        "",
        f"Times are processor time on one thread at {time_depth} blocks. In each of {num_rounds} rounds, every variant",
        "runs one step, in random order; *time* is the median over rounds of the ratio to the stored twin's step in",
        "the same round, and the quartiles follow. The loss is the sum of the output times fixed random numbers.",
        *(faults if has_faults else no_faults),
        "",
    ]


def variants_section(methods: Sequence[Method]) -> list[str]:
    """Return the lines that describe the variants."""
    described = dict.fromkeys((method.name, method.description) for method in methods)
    return [
        "## Variants",
        "",
        "c1, c2 and r: the outputs of the convolutions of a function, of which r is the last. qkv, sdpa and o: the",
        "outputs of the first linear layer, of attention and of the last linear layer in F; l1 and l2: of the linear",
        "layers in G.",
        "",
        *[f"- {name}: {text}" for name, text in described],
        "",
    ]


# One workload in one precision ----------------------------------------------------------------------------------------


def count_all(setting: Setting, depth: int) -> list[tuple[int, str]]:
    """Return the bytes of a step of every variant, or a note if another library fails."""
    functions = setting.case.functions(depth, CPU)
    counts = []
    with one_thread():
        for family, method in setting.variants():
            count = partial(count_bytes, method, setting, functions, is_library=family == "library")
            num_bytes, note = attempt(method, family, count)
            counts.append((num_bytes or 0, note))
    return counts


def attempt(method: Method, family: str, action: Callable[[], Any]) -> tuple[Any, str]:
    """Return the result of an action and no note; if another library is missing or fails, return None and a note."""
    if note := method.missing():
        return None, note
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns about old code in the other libraries
        try:
            return action(), ""
        except Exception as error:
            if family != "library":
                raise
            return None, one_line(error)


def count_bytes(method: Method, setting: Setting, functions: Sequence[FunctionPair], *, is_library: bool) -> int:
    """Return the bytes of a step, after a comparison with the prediction."""
    runner = Runner(method, setting.case, functions, CPU)
    if is_library:
        return runner.memory().peak_bytes
    if setting.autocast is not None:
        step_seconds(runner, setting.autocast)
    weights = torch.cat(setting.case.streams(2), setting.case.split_dim)

    def loss(y: Tensor) -> Tensor:
        return (y * weights).sum()

    x = runner.fresh_input()
    counted, predicted = (
        way(runner.module, x, loss=loss, autocast=setting.autocast).activation_bytes for way in (measure, predict)
    )
    if counted != predicted:
        raise RuntimeError(f"{setting}, {method.name}: counted {counted:,} bytes, predicted {predicted:,}")
    return counted


def time_in_turns(setting: Setting, methods: Sequence[Method], depth: int, num_rounds: int) -> list[Outcome]:
    """Run a step of every variant in each round, in random order."""
    functions = setting.case.functions(depth, CPU)
    families = {method.name: family for family, method in setting.variants()}
    outcomes, turns = [], []
    for method in methods:
        runner, note = attempt(
            method, families.get(method.name, "revnet"), partial(warm_runner, method, setting, functions)
        )
        outcomes.append(Outcome(note=note))
        if not note:
            turns.append((runner, outcomes[-1]))
    shuffle = random.Random(0).shuffle  # a separate generator, since revtorch draws from the global one
    with frozen(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(num_rounds):
            shuffle(turns)
            for runner, outcome in turns:
                outcome.seconds.append(step_seconds(runner, setting.autocast))
            print(f"{setting.workload}, {setting.precision}: round {number + 1}", file=sys.stderr, flush=True)
    return outcomes


def warm_runner(method: Method, setting: Setting, functions: Sequence[FunctionPair]) -> Runner:
    """Return a runner that has run one step."""
    runner = Runner(method, setting.case, functions, CPU)
    step_seconds(runner, setting.autocast)
    return runner


def autocasting(dtype: torch.dtype | None) -> torch.autocast:
    """Return the context in which autocast casts to `dtype`; None for no autocast."""
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


def step_seconds(runner: Runner, autocast: torch.dtype | None) -> float:
    """Return the processor time of one step."""
    runner.zero_grad()
    x = runner.fresh_input()
    gc.collect()  # so that a variant does not pay for collecting another one's garbage
    start = time.process_time()
    with autocasting(autocast):
        loss = runner.loss(x)
    loss.backward()
    return time.process_time() - start


def rows_of(setting: Setting, outcomes: Sequence[Outcome]) -> list[Row]:
    """Return the rows of the CSV for one workload in one precision."""
    rows: list[Row] = []
    twin = outcomes[0]
    for (family, method), outcome in zip(setting.variants(), outcomes, strict=True):
        row: Row = {"workload": setting.workload, "precision": setting.precision, "family": family}
        row |= {"variant": method.name, "activation_bytes": outcome.num_bytes}
        row |= {"share": outcome.num_bytes / twin.num_bytes}
        row |= dict.fromkeys(("step_seconds", "ratio_first_quartile", "ratio", "ratio_third_quartile"), "")
        if not outcome.note:
            ratios = ratios_of(outcome, twin)
            row |= {"step_seconds": statistics.median(outcome.seconds), "ratio": ratios.median}
            row |= {"ratio_first_quartile": ratios.first, "ratio_third_quartile": ratios.third}
        rows.append({**row, "note": outcome.note})
    return rows


def ratios_of(outcome: Outcome, twin: Outcome) -> Quartiles:
    """Return the ratio to the stored twin's step in the same round."""
    return Quartiles.of([own / other for own, other in zip(outcome.seconds, twin.seconds, strict=True)])


def depths_section(workload: str, depths: Sequence[int], num_rounds: int) -> list[str]:
    """Return the section that compares ratios at two depths."""
    setting = Setting(workload, "float32")
    methods = [method for _, method in setting.variants() if method.name in ("Store()", "Reverse()", "hold f, g")]
    rows = []
    for depth in depths:
        twin, *others = time_in_turns(setting, methods, depth, num_rounds)
        rows.append([str(depth), *[f"{ratios_of(outcome, twin).median:.2f}" for outcome in others]])
    return [
        "## Depth",
        "",
        f"The ratios at two depths, for {workload} in float32. The functions are the same, so the difference is noise",
        "and the first function, which stops early:",
        "",
        *table(("blocks", *[method.name for method in methods[1:]]), rows),
    ]


if __name__ == "__main__":
    main()
