"""Compare revnet with everything else that saves activation memory, on one page.

    python benchmarks/everything.py

Runs `revnet bench` and `revnet bench --host`, which write their own pages, then writes one table of both, what is
better than revnet in each column, and the picture of the README. `--stored ENGINE.csv HOST.csv` uses stored results
instead. Run it on an idle machine in which the libraries of `peers.txt` are installed; it says what is missing.
"""

import argparse
import csv
import datetime
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from _memory_page import MIB, Row, table, write_csv
from front_page import PICTURE, draw, read_peaks

from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.bench import CASES, METHODS, PITFALLS, Settings, run_benchmark, run_host_benchmark
from revnet.bench.host import NUM_ROUNDS
from revnet.bench.run import QUICK

RESULTS = Path(__file__).parent / "results"
OURS = "revnet"
HOST_NAMES: Mapping[str, str] = {"revnet": "revnet, Reverse()"}
"""Names in `revnet bench --host` of methods that have another name there."""
MAX_LOAD = 0.5


@dataclass(frozen=True)
class Column:
    """A column of the table. Smaller numbers are better in all of them."""

    title: str
    what: str
    """The quantity, for a sentence."""
    key: str
    digits: int = 1


def columns(depths: Sequence[int]) -> list[Column]:
    """Return the columns of the table for benchmarks at these depths."""
    found = []
    for case in CASES:
        for depth in depths:
            title, what = f"{case.name}: MiB, {depth} blocks", f"less memory for {case.name}, {depth} blocks"
            found.append(Column(title, what, f"{case.name}, {depth}"))
        found.append(Column(f"{case.name}: step", f"a faster step for {case.name}", f"{case.name}, step", 2))
        title, what = f"{case.name}: host", f"less processor time on tiny tensors for {case.name}"
        found.append(Column(title, what, f"{case.name}, host", 2))
    found.append(Column("pitfalls", "fewer pitfalls", "pitfalls", 0))
    return found


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def collect(engine: Path, host: Path) -> tuple[list[Row], list[int]]:
    """Return a row for each method, and the depths. A quantity that was not measured is None."""
    stored = read(engine)
    depths = sorted({int(row["depth"]) for row in stored if row["quantity"] == "peak"})
    values: dict[tuple[str, str], float] = {}
    for row in stored:
        if row["value"] == "":
            continue
        if row["quantity"] == "peak":
            values[row["method"], f"{row['case']}, {row['depth']}"] = float(row["value"]) / MIB
        elif row["quantity"] == "step / plain, median":
            values[row["method"], f"{row['case']}, step"] = float(row["value"])
        elif row["case"] == "pitfalls":
            failures = values.get((row["method"], "pitfalls"), 0)
            values[row["method"], "pitfalls"] = failures + (row["value"] != "ok")
    times = {(row["method"], row["case"]): row["ratio_median"] for row in read(host)}
    rows: list[Row] = []
    for method in METHODS:
        measured: Row = {"method": method.name}
        for column in columns(depths):
            case, _, quantity = column.key.partition(", ")
            text = times.get((HOST_NAMES.get(method.name, method.name), case)) if quantity == "host" else None
            measured[column.key] = float(text) if text else values.get((method.name, column.key))
        rows.append(measured)
    return rows, depths


def better_than_ours(rows: Sequence[Row], found: Sequence[Column]) -> Iterator[str]:
    """Yield a line for each column, with the methods that are better than revnet's default."""
    ours = next(row for row in rows if row["method"] == OURS)
    for column in found:
        if ours[column.key] is None:
            continue
        better = [row["method"] for row in rows if row[column.key] is not None and row[column.key] < ours[column.key]]
        yield f"- {column.what}: {', '.join(better) if better else 'none'}"


def describe(rows: Sequence[Row], depths: Sequence[int]) -> list[str]:
    """Return the table and the lines after it."""
    found = columns(depths)
    cells = [
        [row["method"]]
        + ["-" if row[column.key] is None else f"{row[column.key]:,.{column.digits}f}" for column in found]
        for row in rows
    ]
    return [
        "*MiB*: peak activation memory of a step. *Step*: time of a step, relative to plain autograd. *Host*: the same",
        "for processor time on tiny tensors, which limits small networks on a GPU. *Pitfalls*:",
        f"of {len(PITFALLS)} cases, the ones in which a method returns wrong numbers, raises or crashes although plain",
        "autograd works. Smaller is better in all columns; - was not measured.",
        "",
        *table(["method", *[column.title for column in found]], cells),
        "",
        f"What is better than the default of revnet, `{OURS}`, in each column:",
        "",
        *better_than_ours(rows, found),
        "",
        "Methods:",
        "",
        *[f"- {method.name}: {method.description}" for method in METHODS],
    ]


def check_machine() -> None:
    """Print what would make the results less useful."""
    if (load := os.getloadavg()[0]) > MAX_LOAD:
        print(
            f"The load average is {load:.2f}; run this on an idle machine, since times depend on it.", file=sys.stderr
        )
    for method in METHODS:
        if missing := method.missing():
            print(f"{method.name} is {missing}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or read stored results, and write the page, its CSV and the picture."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored", nargs=2, type=Path, metavar=("ENGINE.csv", "HOST.csv"))
    parser.add_argument("--quick", action="store_true", help="few shallow stacks, to try the command")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    given = parser.parse_args(arguments)
    command = shlex.join(["python", "benchmarks/everything.py", *arguments])
    if given.stored:
        engine, host = given.stored
    else:
        check_machine()
        host = run_host_benchmark(3 if given.quick else NUM_ROUNDS, given.out_dir, command).with_suffix(".csv")
        engine = run_benchmark(QUICK if given.quick else Settings(), given.out_dir, command).with_suffix(".csv")
    rows, depths = collect(engine, host)
    packages = {method.package: method.version() or "not installed" for method in METHODS if method.package}
    lines = [
        "# revnet and everything else that saves activation memory",
        "",
        *describe_machine(command, peers=packages),
        f"- Measurements: `{engine.name}`, `{host.name}`; their pages describe the workloads",
        "",
        *describe(rows, depths),
    ]
    stem = f"everything_{hardware_name()}_{datetime.date.today()}"
    write_csv(rows, given.out_dir / f"{stem}.csv")
    (given.out_dir / f"{stem}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(read_peaks(engine), given.picture)


if __name__ == "__main__":
    main()
