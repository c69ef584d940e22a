"""A part of `gpu.py`: the tests that need a GPU."""

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
    """Return the files that have tests for a GPU, contracts first."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in path.read_text()]
    names = sorted((str(path.relative_to(ROOT)) for path in files), key=lambda name: "contracts" not in name)
    return names[:1] if quick else names


def rows(setting: Setting) -> Iterator[Row]:
    """Run the tests, and yield the outcome of each test and the reason of each failure."""
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
    # Files that need more than PyTorch, NumPy and pytest do not count as failures.
    num_failed = sum(not reason.startswith("ModuleNotFoundError") for reason in reasons)
    is_in_order = process.returncode in (0, 5) or (process.returncode == 1 and reasons)  # 5: no tests were collected
    if num_failed or not is_in_order:
        raise PartError(f"{num_failed} tests failed; pytest ended with exit code {process.returncode}")


def _read(output: Iterable[str]) -> Iterator[Row]:
    """Print the output of pytest and yield the outcome of each test."""
    broken_file, reasons = "", {}
    for line in output:
        print(line, end="", flush=True)
        if match := _RESULT.match(line):
            yield {"test": match[1], "outcome": match[2].lower(), "note": ""}
        elif match := _REASON.match(line):
            yield {"test": match[2], "outcome": "reason", "note": match[3] or reasons.get(match[2], "")}
        elif match := _HEADING.match(line):
            broken_file = match[1] or ""
        elif line.startswith("E   ") and broken_file:
            reasons[broken_file] = line[4:].strip()  # the summary does not repeat it


def lines(rows_of_part: Sequence[Row]) -> list[str]:
    """Return a table of outcomes by file, and a list of failures."""
    files = sorted({row["test"].partition("::")[0] for row in rows_of_part})
    cells = []
    for file in files:
        outcomes = Counter(row["outcome"] for row in rows_of_part if row["test"].partition("::")[0] == file)
        failed = outcomes["failed"] + outcomes["error"]
        cells.append([file, str(outcomes["passed"]), str(failed), str(outcomes["skipped"])])
    page = [
        "The tests marked `gpu`, without the settings of the repository, so warnings are not errors. The list below",
        "the table has the failures and the files that need packages that are not installed.",
        "",
        *table(("file", "passed", "failed", "skipped"), cells),
    ]
    page += [f"- `{row['test']}`: {row['note'] or 'failed'}" for row in rows_of_part if row["outcome"] == "reason"]
    return [*page, ""]


TESTS = Part("tests", "Tests that need a GPU", 150, rows, lines)
