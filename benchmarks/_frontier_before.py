"""Steps of an earlier commit and of this one, in turns, for `frontier.py`.

Each commit runs in a process of its own, which answers a request with the processor time of one turn.
"""

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from _memory_page import table

from revnet.bench.run import Quartiles

HERE = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("_frontier_worker.py")
HOST_KEEP = "revnet, Reverse(keep=...)"


def is_checkout(folder: Path) -> bool:
    """Return whether the folder has the source of revnet."""
    return (folder / "src" / "revnet" / "__init__.py").is_file()


class Worker:
    """A process that runs steps of one checkout."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self._process = process
        self.names: list[str] = self._answer()

    def seconds(self, name: str) -> float:
        """Return the processor time of one turn of a subject."""
        assert self._process.stdin is not None
        print(name, file=self._process.stdin, flush=True)
        return float(self._answer())

    def _answer(self):  # type: ignore[no-untyped-def]
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker stopped with status {self._process.wait()}")
        return json.loads(line)


@contextmanager
def worker(checkout: Path) -> Iterator[Worker]:
    """Start a process with the library of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve() / "src"), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    command = [sys.executable, str(WORKER)]
    # The context closes both pipes, which ends the process, and waits for it.
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=checkout) as process:
        yield Worker(process)


def before_section(checkout: Path, num_rounds: int) -> list[str]:
    """Return the section that compares another checkout with this one."""
    with ExitStack() as stack:
        old, new = (stack.enter_context(worker(folder)) for folder in (checkout, HERE))
        seconds = in_turns((old, new), num_rounds)
    rows = []
    for name in new.names:
        before, after = seconds[0].get(name), seconds[1][name]
        cells = [name, "" if before is None else f"{1000 * statistics.median(before):.2f}"]
        cells.append(f"{1000 * statistics.median(after):.2f}")
        if before is not None:
            ratio = Quartiles.of([new / old for new, old in zip(after, before, strict=True)])
            cells += [f"{ratio.median:.3f}", f"{ratio.first:.3f}-{ratio.third:.3f}"]
        rows.append([*cells, *[""] * (5 - len(cells))])
    return [
        f"Processor time of a step at commit {_commit(checkout)} and here, in turns of two processes: {num_rounds}",
        "rounds in random order, medians. The first rows are tiny steps of `revnet bench --host`, 16 blocks. The last",
        "rows are whole training steps of the default of `revnet train`: revnet38 on digits, batch 100, SGD.",
        "",
        *table(("step", "before, ms", "after, ms", "after / before", "quartiles"), rows),
        *_per_operator(seconds[1]),
    ]


def in_turns(workers: Sequence[Worker], num_rounds: int) -> list[dict[str, list[float]]]:
    """Return the seconds of every subject, by worker."""
    seconds: list[dict[str, list[float]]] = [{name: [] for name in worker.names} for worker in workers]
    turns = [(number, name) for number, worker in enumerate(workers) for name in worker.names]
    shuffle = random.Random(0).shuffle
    for _ in range(num_rounds):
        shuffle(turns)
        for number, name in turns:
            seconds[number][name].append(workers[number].seconds(name))
    return seconds


def _per_operator(seconds: dict[str, list[float]]) -> list[str]:
    """Return the lines about the cost of keeping, for each operator that runs under its modes."""
    rows = []
    for case, num_operators in (("conv", 32 * 2), ("transformer", 16 * 5)):
        plain, kept = (statistics.median(seconds[f"{case}, {name}"]) for name in ("Reverse()", "Reverse(keep=...)"))
        rows.append([case, str(num_operators), f"{1e6 * (kept - plain) / num_operators:.0f}"])
    return [
        "What `keep` costs on the host: the difference of the two medians, for each output that is kept (all",
        "convolutions, or all linear layers and attention). It covers the modes in both passes and what the kept",
        "operators save.",
        "",
        *table(("case", "kept outputs", "microseconds for each"), rows),
    ]


def _commit(checkout: Path) -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, cwd=checkout).stdout.strip()
