"""Memory: predicted and counted peaks, the cost of plans, and whether a process stays within a budget.

    python benchmarks/memory.py
    python benchmarks/memory.py --plans --model revnet110 --batch-size 128
    python benchmarks/memory.py --real --fraction 0.25

Four tables, each with a flag that selects it:

- `--prediction`: the peak of a step of each model, predicted from shapes and counted while it runs.
- `--plans`: predicted and measured memory and time of plans between the least memory and plain autograd. All variants
  are timed in turn in one process.
- `--real`: a model planned for a fraction of its plain memory, the plain model and its pair, each in a separate
  process: the counted bytes and the growth of the process.
- `--planning`: the processor time of plans by depth. With `--depths 1000`, models of 1,000 blocks.

Writes a page, a CSV for each table and figures to benchmarks/results/. Runs on the CPU, on Linux.
"""

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from _memory_page import Section, write_csv
from _memory_planning import planning_section
from _memory_plans import plans_section
from _memory_prediction import prediction_section
from _memory_real import PAIRS, real_section

from revnet import BudgetError, list_models
from revnet._figure import check_matplotlib
from revnet._hardware import hardware_name
from revnet._provenance import describe_machine

RESULTS = Path(__file__).parent / "results"
TABLES = ("prediction", "plans", "real", "planning")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in TABLES:
        parser.add_argument(
            f"--{name}", action="store_true", help="measure this table only, or with other selected tables"
        )
    parser.add_argument("--models", default=",".join(list_models()), help="for the first table")
    parser.add_argument("--batch-sizes", help="for the first table; 4,16,64 for small images and 1,2,4 for large ones")
    parser.add_argument("--model", default="revnet110", help="for the second and third table")
    parser.add_argument("--batch-size", type=int, default=128, help="for the second and third table")
    parser.add_argument("--num-rounds", type=int, default=7, help="steps of each variant in the second table")
    parser.add_argument(
        "--fraction", type=float, default=0.25, help="fraction of the plain memory, for the third table"
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[100, 1000], help="for the fourth table")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    names = [name for name in TABLES if getattr(given, name)]
    problem = find_problem(given, names or TABLES)
    if problem:
        parser.error(problem)
    check_matplotlib()
    stem = f"{'-'.join(['memory', *names])}_{hardware_name()}_{datetime.date.today()}"
    page = [
        "# Memory: predictions, plans and budgets",
        "",
        *describe_machine(shlex.join(["python", "benchmarks/memory.py", *arguments])),
        "- A step: forward, cross-entropy and backward in float32, channels-last. Peaks include parameters,",
        "  buffers, input, activations, gradients, and the state and step of SGD with momentum. *Counted* is",
        "  `revnet.memory.measure`, which runs the step; *predicted* is `revnet.memory.predict`, from shapes alone.",
        "",
    ]
    for name in names or TABLES:
        try:
            section = measured(name, given, given.out_dir / f"{stem}_{name}.png")
        except BudgetError as error:
            parser.error(str(error))
        print(*section.lines, sep="\n", flush=True)
        page += section.lines
        write_csv(section.rows, given.out_dir / f"{stem}_{name}.csv")
        (given.out_dir / f"{stem}.md").write_text(
            "\n".join(page).rstrip() + "\n"
        )  # saves this table before the next one, which may take long


def measured(name: str, given: argparse.Namespace, picture: Path) -> Section:
    """Measure one of the tables."""
    if name == "prediction":
        return prediction_section(given.models.split(","), sizes_of(given))
    if name == "plans":
        return plans_section(given.model, given.batch_size, given.num_rounds, picture)
    if name == "planning":
        return planning_section(given.depths)
    return real_section(given.model, given.batch_size, given.fraction, picture)


def sizes_of(given: argparse.Namespace) -> list[int] | None:
    """Return the batch sizes of the first table, if they are given."""
    return [int(size) for size in given.batch_sizes.split(",")] if given.batch_sizes else None


def find_problem(given: argparse.Namespace, names: Sequence[str]) -> str | None:
    """Return a problem of the arguments, or None."""
    for name in [*given.models.split(","), given.model]:
        if name not in list_models():
            return f"unknown model {name!r}; choose from {', '.join(list_models())}"
    if "real" in names and given.model not in PAIRS:
        return f"--real needs a reversible --model, not {given.model}; choose from {', '.join(PAIRS)}"
    try:
        least = min(given.batch_size, given.num_rounds, *(sizes_of(given) or [1]))
    except ValueError:
        return f"--batch-sizes {given.batch_sizes!r} must be comma-separated numbers, such as 4,16"
    if min(least, *given.depths) < 1:
        return "batch sizes, rounds and depths must be at least 1"
    if not 0 < given.fraction <= 1:
        return f"--fraction {given.fraction} must be above 0 and at most 1"
    if not given.out_dir.is_dir():
        return f"--out-dir {given.out_dir} is not a folder; create it first"
    return None


if __name__ == "__main__":
    main()
