"""Tests, times and memory on one GPU, within eight minutes.

    PYTHONPATH=src:. python benchmarks/gpu.py
    PYTHONPATH=src:. python benchmarks/gpu.py --parts tests,ratios
    PYTHONPATH=src:. python benchmarks/gpu.py --device cpu --quick     # a dry run

It needs PyTorch, NumPy, pytest and a checkout of the repository, but no network and no installed revnet. `--parts`
selects parts, in order of importance:

- `tests`: the tests marked `gpu`;
- `ratios`: host and step time against plain autograd, `torch.utils.checkpoint` and `save_on_cpu`, at three sizes;
- `capture`: training steps in a CUDA graph next to eager ones: bits, time and memory;
- `policies`: step time and memory by policy, `Offload(overlap=True)` among them;
- `head`: the head and loss of a language model, with whole and chunked logits;
- `memory`: allocated and reserved bytes against `revnet.memory.predict`;
- `models`: RevNet-38, -110 and -164 on small images, RevNet-104 against ResNet-101 on large ones;
- `batches`: the largest batches by `revnet.memory.max_batch_size`, each checked with one step;
- `transformer`: a transformer on 1,024 to 65,536 tokens.

Each part runs in a separate process with a time limit. A part that fails or takes too long keeps its measurements, and
the next part runs. Writes a page and a CSV for each part to benchmarks/results/.
"""

import argparse
import csv
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from _gpu_batches import BATCHES
from _gpu_capture import CAPTURE
from _gpu_head import HEAD
from _gpu_machine import MACHINE
from _gpu_memory import MEMORY
from _gpu_models import MODELS
from _gpu_part import Part, Setting
from _gpu_policies import BY_POLICY
from _gpu_ratios import RATIOS
from _gpu_tests import ROOT, TESTS
from _gpu_transformer import TRANSFORMER
from _memory_page import Row, table

from revnet.bench.pitfalls import one_line

RESULTS = Path(__file__).parent / "results"
PARTS = {part.name: part for part in (TESTS, RATIOS, CAPTURE, BY_POLICY, HEAD, MEMORY, MODELS, BATCHES, TRANSFORMER)}
TOTAL_SECONDS = 460
"""Time for all parts. The most important parts come first, and the last ones get the remaining time."""
ERROR = "error"
"""Column of the last row of a part that failed."""
LEAST_SECONDS = 20
"""Least time for a part. With less it could not even load its imports."""


@dataclass
class Outcome:
    """Result of a part."""

    part: Part
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""
    """Reason of a failure."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and write the results.

    Returns:
        0, or 1 if a part failed; the page has the reason.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated parts")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round, to check that everything runs")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    parser.add_argument(
        "--run", nargs=2, metavar=("PART", "FILE"), help=argparse.SUPPRESS
    )  # used by the processes of the parts
    given = parser.parse_args(arguments)
    setting = Setting(torch.device(given.device), given.quick)
    if given.run:
        part_name, path = given.run
        return run_here({**PARTS, MACHINE.name: MACHINE}[part_name], setting, Path(path))
    names = given.parts.split(",")
    problem = find_problem(names, setting, given.out_dir)
    if problem:
        parser.error(problem)
    command = shlex.join(["python", "benchmarks/gpu.py", *arguments])
    outcomes = run_all([part for name, part in PARTS.items() if name in names], setting, given.out_dir, command)
    return int(any(outcome.note for outcome in outcomes))


def find_problem(names: Sequence[str], setting: Setting, folder: Path) -> str | None:
    """Return a problem of the arguments, or None."""
    for name in names:
        if name not in PARTS:
            return f"unknown part {name!r}; choose from {', '.join(PARTS)}"
    if setting.device.type == "cuda" and not torch.cuda.is_available():
        return "PyTorch finds no GPU; pass `--device cpu --quick` for a dry run without one"
    if setting.device.type != "cuda" and not setting.quick:
        return f"--device {setting.device} would take hours; add --quick for a dry run"
    if not folder.is_dir():
        return f"--out-dir {folder} is not a folder; create it first"
    return None


def run_all(parts: Sequence[Part], setting: Setting, folder: Path, command: str) -> list[Outcome]:
    """Run the parts in order, and write the page after each one."""
    end = time.monotonic() + TOTAL_SECONDS
    machine = run_apart(MACHINE, setting, MACHINE.limit_seconds)
    hardware = machine.rows[0]["hardware"] if machine.rows else setting.device.type
    theme = "-".join(["gpu", *["quick"] * setting.quick, *[part.name for part in parts if len(parts) < len(PARTS)]])
    stem = f"{theme}_{hardware}_{datetime.date.today()}"
    outcomes: list[Outcome] = []
    for part in parts:
        print(f"--- {part.name}", flush=True)
        left = min(part.limit_seconds, end - time.monotonic())
        outcome = run_apart(part, setting, left) if left > LEAST_SECONDS else Outcome(part, note="no time left")
        outcomes.append(outcome)
        if outcome.rows:
            write_csv(outcome.rows, folder / f"{stem}_{part.name}.csv")
        text = page(machine, outcomes, command)
        (folder / f"{stem}.md").write_text(text)
    print(text)
    return outcomes


def run_apart(part: Part, setting: Setting, seconds: float) -> Outcome:
    """Run a part in a separate process, and kill it and its children when the time is over."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.touch()
        command = [sys.executable, __file__, "--device", str(setting.device), *["--quick"] * setting.quick]
        paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        start = time.monotonic()
        process = subprocess.Popen(
            [*command, "--run", part.name, str(path)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            start_new_session=True,
        )
        note = ""
        try:
            code = process.wait(seconds)
            if code:
                note = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            note = f"ended after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        outcome = Outcome(part, seconds=time.monotonic() - start, note=note)
        outcome.rows = read_rows(path)
    if outcome.rows and ERROR in outcome.rows[-1]:
        outcome.note = outcome.rows.pop()[ERROR]
    return outcome


def run_here(part: Part, setting: Setting, path: Path) -> int:
    """Run a part in this process, and write each row as soon as it is measured."""
    with path.open("w") as file:
        try:
            for row in part.rows(setting):
                print(json.dumps(row), file=file, flush=True)
        except Exception as error:
            traceback.print_exc()
            print(json.dumps({ERROR: one_line(error)}), file=file, flush=True)
            return 1
    return 0


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a part, up to an incomplete line."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def page(machine: Outcome, outcomes: Sequence[Outcome], command: str) -> str:
    """Return the page: outcomes of the parts, then their tables."""
    head = MACHINE.lines(machine.rows) if machine.rows else [f"- The machine could not be described: {machine.note}"]
    cells = [[outcome.part.name, outcome.note or "done", f"{outcome.seconds:.0f}"] for outcome in outcomes]
    text = [
        "# Reversible training on one GPU",
        "",
        *[line.replace("{command}", command) for line in head],
        "",
        *table(("part", "outcome", "seconds"), cells),
    ]
    for outcome in outcomes:
        text += [f"## {outcome.part.title}", ""]
        text += [f"**Not complete: {outcome.note}**", ""] if outcome.note else []
        text += [*"\n".join(outcome.part.lines(outcome.rows)).rstrip().splitlines(), ""] if outcome.rows else []
    return "\n".join(text).rstrip() + "\n"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the rows. Rows of failures lack some columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
