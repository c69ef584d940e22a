"""The first part of `gpu.py`: the tests that need a GPU."""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from _gpu_part import Part, PartError, Setting
from _memory_page import Row, table

ROOT = Path(__file__).parent.parent
MARK = "pytest.mark.gpu"
_RESULT = re.compile(r"^(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_HEADING = re.compile(r"^[_=]{3,} (?:ERROR collecting (\S+))?")
_REASON = re.compile(r"^(FAILED|ERROR) (tests/\S+.*?)(?: - (.*))?$")


def files_with_marks(quick: bool) -> list[str]:
    """Return the files that have tests for a GPU, the contracts first."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in path.read_text()]
    names = sorted((str(path.relative_to(ROOT)) for path in files), key=lambda name: "contracts" not in name)
    return names[:1] if quick else names


def rows(setting: Setting) -> Iterator[Row]:
    """Run the tests, and yield what became of each; then, for each that failed, why."""
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "--import-mode=importlib"]
    command += ["-m", "gpu", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    environment = os.environ | {"COLUMNS": "240", "PY_COLORS": "0"}
    command += files_with_marks(setting.quick)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, text=True, cwd=ROOT, env=environment, **output) as process:
        assert process.stdout is not None
        reasons = []
        for row in _read(process.stdout):
            yield row
            reasons += [row["note"]] if row["outcome"] == "reason" else []
    # A file that needs more than PyTorch, NumPy and pytest is left out.
    num_failed = sum(not reason.startswith("ModuleNotFoundError") for reason in reasons)
    is_in_order = process.returncode in (0, 5) or (process.returncode == 1 and reasons)  # 5: there was nothing to run
    if num_failed or not is_in_order:
        raise PartError(f"{num_failed} tests failed; pytest ended with exit code {process.returncode}")


def _read(output: Iterable[str]) -> Iterator[Row]:
    """Yield what pytest says of each test, and print it."""
    broken_file, reasons = "", {}
    for line in output:
        print(line, end="", flush=True)
        if found := _RESULT.match(line):
            yield {"test": found[1], "outcome": found[2].lower(), "note": ""}
        elif found := _REASON.match(line):
            yield {"test": found[2], "outcome": "reason", "note": found[3] or reasons.get(found[2], "")}
        elif found := _HEADING.match(line):
            broken_file = found[1] or ""
        elif line.startswith("E   ") and broken_file:
            reasons[broken_file] = line[4:].strip()  # the summary does not repeat it


def lines(found: Sequence[Row]) -> list[str]:
    """Count outcomes by file, and list what failed."""
    files = sorted({row["test"].partition("::")[0] for row in found})
    cells = []
    for file in files:
        outcomes = Counter(row["outcome"] for row in found if row["test"].partition("::")[0] == file)
        failed = outcomes["failed"] + outcomes["error"]
        cells.append([file, str(outcomes["passed"]), str(failed), str(outcomes["skipped"])])
    page = [
        "The tests that are marked `gpu`, without the settings of the repository: warnings are not errors. Below the",
        "table, what failed, and the files that need packages which are not installed.",
        "",
        *table(("file", "passed", "failed", "skipped"), cells),
    ]
    page += [f"- `{row['test']}`: {row['note'] or 'failed'}" for row in found if row["outcome"] == "reason"]
    return [*page, ""]


TESTS = Part("tests", "Tests that need a GPU", 150, rows, lines)
