"""Numerics: drift, tolerances, the accuracy of exact reversal, and drift during training.

    python benchmarks/numerics.py --data path/to/cifar10
    python benchmarks/numerics.py --scales
    python benchmarks/numerics.py --accuracy --data path/to/cifar10 --num-updates 500 --seeds 0,1

Four tables, each with a flag that selects it:

- `--scales`: blocks with weights scaled by 1, 2, 4 and 8: gradient errors and drift without a bound and with a
  tolerance, and the number of keyframes.
- `--curves`: drift during training in float32, with bfloat16 autocast and with exact reversal; the cost of the meter.
- `--accuracy`: RevNet-38 on CIFAR-10 with float and exact reversal, from the same seeds.
- `--conditioning`: training with and without the conditioning penalty.

Writes a page, a CSV for each table and figures to benchmarks/results/.
"""

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from _memory_page import Section, write_csv
from _numerics_accuracy import accuracy_section
from _numerics_conditioning import conditioning_section
from _numerics_curves import curves_section
from _numerics_scales import scales_section

from revnet._figure import check_matplotlib
from revnet._hardware import hardware_name
from revnet._provenance import describe_machine

RESULTS = Path(__file__).parent / "results"
TABLES = ("scales", "curves", "accuracy", "conditioning")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in TABLES:
        parser.add_argument(
            f"--{name}", action="store_true", help="measure this table only, or with other selected tables"
        )
    parser.add_argument("--data", default="cifar10", help="CIFAR-10 for the third table, by name or folder")
    parser.add_argument("--num-updates", type=int, default=500, help="for the third table")
    parser.add_argument("--seeds", default="0,1", help="for the third table")
    parser.add_argument("--num-steps", type=int, default=300, help="for the second and fourth table")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    problem = find_problem(given)
    if problem:
        parser.error(problem)
    check_matplotlib()
    names = [name for name in TABLES if getattr(given, name)] or list(TABLES)
    date = datetime.date.today()
    for name in names:
        stem = f"numerics-{name}_{hardware_name()}_{date}"
        section = measured(name, given, given.out_dir / f"{stem}.png")
        title = ["# Numerics", "", *describe_machine(shlex.join(["python", "benchmarks/numerics.py", *arguments])), ""]
        print(*section.lines, sep="\n", flush=True)
        (given.out_dir / f"{stem}.md").write_text("\n".join([*title, *section.lines]).rstrip() + "\n")
        write_csv(section.rows, given.out_dir / f"{stem}.csv")


def measured(name: str, given: argparse.Namespace, picture: Path) -> Section:
    """Measure one of the tables."""
    if name == "scales":
        return scales_section(picture)
    if name == "curves":
        return curves_section(given.num_steps, picture)
    if name == "accuracy":
        return accuracy_section(given.data, given.num_updates, seeds_of(given))
    return conditioning_section(given.num_steps)


def seeds_of(given: argparse.Namespace) -> list[int]:
    return [int(seed) for seed in given.seeds.split(",")]


def find_problem(given: argparse.Namespace) -> str | None:
    """Return a problem of the arguments, or None."""
    try:
        seeds = seeds_of(given)
    except ValueError:
        return f"--seeds {given.seeds!r} must be comma-separated numbers, such as 0,1"
    if min(given.num_updates, given.num_steps) < 1 or min(seeds) < 0:
        return "updates and steps must be at least 1, and seeds at least 0"
    if not given.out_dir.is_dir():
        return f"--out-dir {given.out_dir} is not a folder; create it first"
    return None


if __name__ == "__main__":
    main()
