"""A wrong argument raises a one-line error that names it. All arguments of all public functions are tested."""

import json
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import get_type_hints

import pytest

from revnet import ReversibleBlock, create_model
from tests.contracts import wrong_arguments

ROOT = Path(__file__).parent.parent.parent
MOST_FOREIGN = 100


def judgments(*flags: str) -> dict[str, tuple[str, str]]:
    """Return the driver's judgment of each case. It runs in a separate process, which a case may kill."""
    results: dict[str, tuple[str, str]] = {}
    start = 0
    while True:
        command = [sys.executable, "-m", "tests.contracts.wrong_arguments", str(start), *flags]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in run.stdout.splitlines()]
        results |= {place: (judgment, message) for _, place, judgment, message in (x for x in lines if len(x) == 4)}
        if run.returncode == 0:
            return results
        if not lines or len(lines[-1]) == 4:
            raise AssertionError(f"the driver failed: {run.stderr[-2000:]}")
        number, place = lines[-1]
        results[place] = ("endless", run.stderr[-300:])
        start = number + 1


def check(results: dict[str, tuple[str, str]]) -> None:
    counts = Counter(judgment for judgment, _ in results.values())
    places = defaultdict(list)
    for place, (judgment, message) in results.items():
        places[judgment].append(f"{place}: {message}")
    for judgment in ("endless", "accepted", "nameless", "several lines"):
        assert places[judgment] == []
    assert counts["foreign"] <= MOST_FOREIGN, places["foreign"]
    assert counts["right"] > 0.95 * len(results)


def test_a_few_wrong_values():
    results = judgments("--quick")
    assert len(results) > 2000
    check(results)


@pytest.mark.slow
def test_all_wrong_values():
    results = judgments()
    assert len(results) > 9000
    check(results)


def test_tries_everything_public():
    tried = {target.name for target in wrong_arguments.targets()}
    assert wrong_arguments.public_names() - tried - set(wrong_arguments.LEFT_OUT) == set()


def test_driver_knows_the_values_of_annotations():
    allows = wrong_arguments.allows
    hint = get_type_hints(ReversibleBlock.__init__)["split_dim"]
    assert [allows(hint, value) for value in (1, -1, None, True, 1.0, "x")] == [True, True, True, False, False, False]
    assert allows(float, 3)
    assert not allows(float, True)
    assert not allows(bool, 1)
    assert allows(tuple[int, ...], (1, 2))
    assert not allows(tuple[int, ...], (1, "x"))


@pytest.mark.parametrize(
    ("call", "judgment"),
    [
        (lambda value: value, "accepted"),
        (lambda value: [].index(value), "nameless"),
        (lambda value: json.loads("{"), "foreign"),
        (lambda value: create_model(value), "right"),
        (lambda value: all(True for _ in iter(int, 1)), "endless"),
    ],
)
def test_driver_judges(call, judgment, monkeypatch):
    """The functions fail in each possible way. Functions of this file count as revnet's."""
    monkeypatch.setattr(wrong_arguments, "SOURCE", str(ROOT))
    monkeypatch.setattr(wrong_arguments, "LIMIT_SECONDS", 0.2)
    target = wrong_arguments.Target("call", lambda name: call(name), dict)
    # The time limit of a test uses the same signal.
    handler, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    try:
        wrong_arguments.watch()
        assert wrong_arguments.judge(target, "name", str, 3)[0] == judgment
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)
