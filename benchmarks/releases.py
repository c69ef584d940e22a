"""The tests on several releases of PyTorch: passed, failed and skipped, by room.

    scripts/releases 2.11 2.13 2.15

For one release at a time, it makes an environment in a temporary folder, runs the tests of each room in it, and removes
it. Where the package index has builds for CUDA only, a release takes about 3 GB, and the tests run on the CPU. Rooms
are the folders in tests/; `other` stands for the files next to them. Without `--rooms`, the tests of the library run,
and the tests of training, the command line and the benchmarks do not.

It writes a page and its CSV to benchmarks/results/. A second call on the same day adds to them: it replaces the rows
of the rooms that it runs. `--every 10` runs every tenth test of a room, and the table says so; it does not replace the
row of a whole room.
"""

import argparse
import csv
import datetime
import os
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from _memory_page import table

from revnet._hardware import hardware_name, processor_name
from revnet._provenance import _revision

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LIBRARY = [
    "contracts",
    "engine",
    "functional",
    "coupling",
    "nn",
    "models",
    "memory",
    "numerics",
    "optim",
    "distributed",
]
"""Rooms that run without `--rooms`."""
OTHER = "other"
EXTRAS = ("train", "tensorboard", "completion")
TOOLS = ("pytest>=8", "pytest-timeout", "pytest-xdist", "hatchling>=1.26")
_MOST_MESSAGE = 200


@dataclass(frozen=True)
class Result:
    """Outcome of the tests of one room on one release."""

    torch: str
    """Version of PyTorch, with its build."""
    python: str
    """Version of Python."""
    revision: str
    """Commit of revnet."""
    room: str
    passed: int
    failed: int
    skipped: int
    failures: str
    """The tests that failed, one in a line, with the first line of each error."""
    every: int = 1
    """1 for all tests of the room, and n for every n-th."""


def list_rooms() -> list[str]:
    """Return the folders of tests, and the name for the files next to them."""
    folders = [path.name for path in (ROOT / "tests").iterdir() if any(path.rglob("test_*.py"))]
    return [*sorted(folders), OTHER]


def files_of(room: str) -> list[str]:
    """Return what pytest runs for a room."""
    if room != OTHER:
        return [f"tests/{room}"]
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("test_*.py"))


# Environments ---------------------------------------------------------------------------------------------------------


def requirements(release: str) -> list[str]:
    """Return what an environment with a release contains: `2.11` stands for the newest version of 2.11."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *[line for extra in ("cli", *EXTRAS) for line in extras[extra]], *TOOLS]
    own = [line for line in listed if not line.startswith(("revnet[", "torch>="))]
    return [f"torch=={release}.*" if release.count(".") == 1 else f"torch=={release}", *own]


@contextmanager
def environment(release: str, given: Path | None, interpreter: str = sys.executable) -> Iterator[Path]:
    """Yield the interpreter of the given environment, or of a new one with a release, which is removed afterwards.

    Args:
        release: Release of PyTorch.
        given: The environment, or None for a new one.
        interpreter: The Python of a new one.
    """
    if given is not None:
        yield given / "bin" / "python"
        return
    with tempfile.TemporaryDirectory(prefix=f"revnet-torch-{release}-") as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        # Tests also run the installed command `revnet`. `--no-deps` keeps the release of PyTorch.
        for lines in (requirements(release), ["--no-deps", "--editable", str(ROOT)]):
            installed = subprocess.run([python, "-m", "pip", "install", "--quiet", *lines])
            if installed.returncode:
                raise SystemExit(f"scripts/releases: error: PyTorch {release} was not installed; see the lines above.")
        yield python


def versions_of(python: Path) -> tuple[str, str]:
    """Return the versions of PyTorch and Python in an environment."""
    code = "import platform, torch; print(torch.__version__, platform.python_version())"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    torch, version = done.stdout.split()
    return torch, version


# Tests ----------------------------------------------------------------------------------------------------------------


def run_room(python: Path, room: str, num_workers: int, every: int = 1) -> tuple[int, int, int, str]:
    """Return the numbers of passed, failed and skipped tests of a room, or of a sample of them, and its failures.

    Raises:
        RuntimeError: pytest did not report.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", "pytest", *files_of(room), "-q", "-n", str(num_workers)]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
        if every > 1:
            command += ["-p", "_every_nth_test", f"--every-nth={every}"]
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), str(ROOT / "benchmarks")])
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
        )
        if not report.exists():
            raise RuntimeError(f"pytest did not report on {room}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return read_report(report)


def read_report(report: Path) -> tuple[int, int, int, str]:
    """Return the numbers of passed, failed and skipped tests in a JUnit report, and its failures."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    failures = []
    for case in cases:
        outcome = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        if outcome is not None:
            message = " ".join((outcome.get("message") or "").split())[:_MOST_MESSAGE]
            failures.append(f"{case.get('classname')}::{case.get('name')}: {message}")
    return len(cases) - len(skipped) - len(failures), len(failures), len(skipped), "\n".join(failures)


# Results --------------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> list[Result]:
    """Return the results of earlier calls, or nothing."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [Result(**{f.name: f.type(row[f.name]) for f in fields(Result) if f.name in row}) for row in rows]


def merged(results: Sequence[Result], new: Result) -> list[Result]:
    """Return the results with a new one instead of an earlier one for the same room and the same versions.

    A sample does not replace all tests of a room.
    """
    key = (new.torch, new.python, new.room)
    if any((r.torch, r.python, r.room) == key and r.every < new.every for r in results):
        return list(results)
    others = [result for result in results if (result.torch, result.python, result.room) != key]
    order = {room: index for index, room in enumerate([*LIBRARY, *list_rooms()][::-1])}
    return sorted([*others, new], key=lambda r: (-order.get(r.room, 0), _number(r.torch), _number(r.python)))


def _number(version: str) -> list[int]:
    return [int(part) for part in version.partition("+")[0].split(".") if part.isdigit()]


def _counts(results: Sequence[Result]) -> str:
    numbers = zip(*[(r.passed, r.failed, r.skipped) for r in results], strict=True)
    return " / ".join(f"{sum(column):,}" for column in numbers)


def render(results: Sequence[Result]) -> list[str]:
    """Return the lines of the page."""
    columns = sorted({(r.torch, r.python) for r in results}, key=lambda key: [_number(version) for version in key])
    cells = {(r.room, r.torch, r.python): _counts([r]) + f" (1 of {r.every})" * (r.every > 1) for r in results}
    rooms = list(dict.fromkeys(r.room for r in results))
    rows = [[room, *[cells.get((room, *column), "") for column in columns]] for room in rooms]
    totals = [_counts([r for r in results if (r.torch, r.python) == column]) for column in columns]
    releases = dict.fromkeys(".".join(torch.partition("+")[0].split(".")[:2]) for torch, _ in columns)
    command = " ".join(["scripts/releases", *releases, "--rooms", ",".join(rooms)])
    revisions = ", ".join(dict.fromkeys(r.revision for r in results))
    lines = [
        "# Releases of PyTorch",
        "",
        f"- Hardware: {os.cpu_count()} cores of {processor_name()}, no GPU used",
        f"- Versions: revnet {revisions}; of PyTorch and Python in the table",
        f"- Date: {datetime.date.today()}",
        f"- Command: `{command}`; an empty cell was not run",
        "",
        "Tests of each room: passed / failed / skipped. Builds with `+cu` ran on the CPU.",
        *["(1 of 10) stands for every tenth test: `--every 10`."] * any(r.every > 1 for r in results),
        "",
        *table(["room", *[f"{torch}, Python {python}" for torch, python in columns]], [*rows, ["all", *totals]]),
    ]
    failed = [r for r in results if r.failures]
    if failed:
        lines += ["## Failures", ""]
        lines += [f"- {r.torch}: `{line}`" for r in failed for line in r.failures.replace("`", "'").splitlines()]
        lines += [""]
    return lines


# Command line ---------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the settings."""
    parser = argparse.ArgumentParser("scripts/releases", description=__doc__, allow_abbrev=False)
    parser.add_argument("releases", nargs="+", metavar="RELEASE", help="such as 2.11 or 2.11.0")
    parser.add_argument("--rooms", default=",".join(LIBRARY), help="rooms, separated by commas, or `all`")
    parser.add_argument(
        "--env", action="append", default=[], metavar="RELEASE=FOLDER", help="use this environment, and keep it"
    )
    parser.add_argument("--python", default=sys.executable, help="Python of new environments, such as python3.13")
    parser.add_argument("--num-workers", type=int, default=2, help="processes that run tests")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="run every N-th test of a room")
    parser.add_argument("--out-dir", type=Path, default=RESULTS, help="folder of the page and its CSV")
    settings = parser.parse_args(arguments)
    if settings.every < 1:
        parser.error(f"`--every` (={settings.every}) must be at least 1.")
    known = list_rooms()
    settings.rooms = known if settings.rooms == "all" else settings.rooms.split(",")
    for room in settings.rooms:
        if room not in known:
            parser.error(f"`--rooms` names {room!r}, but the rooms are {', '.join(known)}.")
    given = dict(entry.partition("=")[::2] for entry in settings.env)
    for release, folder in given.items():
        if release not in settings.releases:
            parser.error(f"`--env` names the release {release!r}, which is not among the arguments.")
        if not (Path(folder) / "bin" / "python").exists():
            parser.error(f"`--env {release}={folder}` is not a virtual environment: it has no bin/python.")
    settings.env = {release: Path(folder) for release, folder in given.items()}
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests and write the page; return 1 if a test failed."""
    settings = parse(arguments)
    stem = f"releases_{hardware_name()}_{datetime.date.today()}"
    page, csv_path = settings.out_dir / f"{stem}.md", settings.out_dir / f"{stem}.csv"
    revision = _revision()
    num_failed = 0
    for release in settings.releases:
        with environment(release, settings.env.get(release), settings.python) as python:
            versions = versions_of(python)
            for room in settings.rooms:
                outcome = run_room(python, room, settings.num_workers, settings.every)
                result = Result(*versions, revision, room, *outcome, every=settings.every)
                num_failed += result.failed
                print(f"{release}  {room:12}  {result.passed} passed, {result.failed} failed, {result.skipped} skipped")
                # After each room, so that a run that is stopped keeps what it has.
                results = merged(read_results(csv_path), result)
                with csv_path.open("w", newline="") as file:
                    writer = csv.DictWriter(file, [f.name for f in fields(Result)])
                    writer.writeheader()
                    writer.writerows(map(asdict, results))
                page.write_text("\n".join(render(results)))
    print(page)
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
