"""Memory: what is predicted beside what is counted, what plans cost, and whether a process keeps to a budget.

    python benchmarks/memory.py
    python benchmarks/memory.py --plans --model revnet110 --batch-size 128
    python benchmarks/memory.py --real --fraction 0.25

Three tables, each also alone by its flag:

- `--prediction`: the peak of a step of each model, predicted from shapes and counted while it runs.
- `--plans`: plans between the least memory and plain autograd's: their memory and time, as foreseen and as they run.
  All ways of running take turns in one process.
- `--real`: a model told to fit in a fraction of its plain memory, the plain model and its pair, each in a process of
  its own: the bytes counted, and the growth of the process.

Writes a page, a CSV for each table and pictures into benchmarks/results/. On the CPU, on Linux.
"""

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from _memory_page import Section, write_csv
from _memory_plans import plans_section
from _memory_prediction import prediction_section
from _memory_real import PAIRS, real_section

from revnet import BudgetError, list_models
from revnet._figure import check_matplotlib
from revnet.bench import describe_machine, hardware_name

RESULTS = Path(__file__).parent / "results"
TABLES = ("prediction", "plans", "real")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in TABLES:
        parser.add_argument(f"--{name}", action="store_true", help="this table alone, or with others that are named")
    parser.add_argument("--models", default=",".join(list_models()), help="of the first table")
    parser.add_argument("--batch-sizes", help="of the first table; 4,16,64 for small images and 1,2,4 for large ones")
    parser.add_argument("--model", default="revnet110", help="of the second and third table")
    parser.add_argument("--batch-size", type=int, default=128, help="of the second and third table")
    parser.add_argument("--num-rounds", type=int, default=7, help="steps of each way of running, in the second table")
    parser.add_argument("--fraction", type=float, default=0.25, help="of the plain memory, in the third table")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    names = [name for name in TABLES if getattr(given, name)]
    complaint = wrong(given, names or TABLES)
    if complaint:
        parser.error(complaint)
    check_matplotlib()
    stem = f"{'-'.join(['memory', *names])}_{hardware_name()}_{datetime.date.today()}"
    page = [
        "# Memory: predicted, planned, kept",
        "",
        *describe_machine(shlex.join(["python", "benchmarks/memory.py", *arguments])),
        "- A step: forward, cross-entropy and backward in float32, channels-last. Peaks are of everything: parameters,",
        "  buffers, input, activations, gradients, and the state and step of SGD with momentum. *Counted* is",
        "  `revnet.memory.measure`, which runs the step; *predicted* is `revnet.memory.predict`, from shapes alone.",
        "",
    ]
    for name in names or TABLES:
        try:
            section = measured(name, given, given.output_dir / f"{stem}_{name}.png")
        except BudgetError as error:
            parser.error(str(error))
        print(*section.lines, sep="\n", flush=True)
        page += section.lines
        write_csv(section.rows, given.output_dir / f"{stem}_{name}.csv")
        (given.output_dir / f"{stem}.md").write_text("\n".join(page).rstrip() + "\n")  # The next one may take long.


def measured(name: str, given: argparse.Namespace, picture: Path) -> Section:
    """One of the tables."""
    if name == "prediction":
        return prediction_section(given.models.split(","), sizes_of(given))
    if name == "plans":
        return plans_section(given.model, given.batch_size, given.num_rounds, picture)
    return real_section(given.model, given.batch_size, given.fraction, picture)


def sizes_of(given: argparse.Namespace) -> list[int] | None:
    """The batch sizes of the first table, if they are given."""
    return [int(size) for size in given.batch_sizes.split(",")] if given.batch_sizes else None


def wrong(given: argparse.Namespace, names: Sequence[str]) -> str | None:
    """What can be seen to be wrong before anything takes minutes."""
    for name in [*given.models.split(","), given.model]:
        if name not in list_models():
            return f"there is no model {name!r}; choose of {', '.join(list_models())}"
    if "real" in names and given.model not in PAIRS:
        return f"--real needs a reversible --model, not {given.model}; choose of {', '.join(PAIRS)}"
    try:
        least = min(given.batch_size, given.num_rounds, *(sizes_of(given) or [1]))
    except ValueError:
        return f"--batch-sizes {given.batch_sizes!r} must be numbers with commas between, such as 4,16"
    if least < 1:
        return "batch sizes and rounds must be 1 or more"
    if not 0 < given.fraction <= 1:
        return f"--fraction {given.fraction} must be above 0, and 1 at most"
    if not given.output_dir.is_dir():
        return f"--output-dir {given.output_dir} is no folder; make it first"
    return None


if __name__ == "__main__":
    main()
