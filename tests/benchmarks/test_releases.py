"""`benchmarks/releases.py` on a room with one test, and its table."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

REPORT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.nn.test_a" name="test_passes" />
<testcase classname="tests.nn.test_a" name="test_skips"><skipped message="needs a GPU" /></testcase>
<testcase classname="tests.nn.test_a" name="test_fails"><failure message="Error:&#10;1 == 2" /></testcase>
<testcase classname="tests.nn.test_a" name="test_breaks"><error message="no module" /></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def releases():
    return import_module("releases")


def result(releases, room="nn", torch="2.11.0", **changes):
    values = {"python": "3.11.7", "revision": "1.0", "passed": 1, "failed": 0, "skipped": 0, "failures": ""}
    return releases.Result(torch=torch, room=room, **{**values, **changes})


def test_reads_a_report(releases, tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert releases.read_report(report) == (
        1,
        2,
        1,
        "tests.nn.test_a::test_fails: Error: 1 == 2\ntests.nn.test_a::test_breaks: no module",
    )


def test_later_results_replace_earlier_ones_in_a_fixed_order(releases):
    results = []
    for new in (
        result(releases, "nn", failed=3, failures="t: broke"),
        result(releases, "contracts"),
        result(releases, "cli", torch="2.9.1"),
        result(releases, "nn", passed=1_234),
    ):
        results = releases.merged(results, new)
    assert [(r.room, r.passed) for r in results] == [("contracts", 1), ("nn", 1_234), ("cli", 1)]
    lines = releases.render(results)
    assert [line for line in lines if line.startswith("|")] == [
        "| room | 2.9.1, Python 3.11.7 | 2.11.0, Python 3.11.7 |",
        "| --- | ---: | ---: |",
        "| contracts |  | 1 / 0 / 0 |",
        "| nn |  | 1,234 / 0 / 0 |",
        "| cli | 1 / 0 / 0 |  |",
        "| all | 1 / 0 / 0 | 1,235 / 0 / 0 |",
    ]


def test_a_sample_is_marked_and_replaces_no_whole_room(releases):
    results = releases.merged([], result(releases, "nn", every=10))
    assert "| nn | 1 / 0 / 0 (1 of 10) |" in releases.render(results)
    results = releases.merged(results, result(releases, "nn", passed=9))
    results = releases.merged(results, result(releases, "nn", every=10))
    assert [(r.passed, r.every) for r in results] == [(9, 1)]


def test_failures_are_listed(releases):
    lines = releases.render([result(releases, failed=1, failures="tests.nn::test_a: a `b`")])
    assert "- 2.11.0: `tests.nn::test_a: a 'b'`" in lines


def test_requirements_of_a_release(releases):
    assert releases.requirements("2.11")[0] == "torch==2.11.*"
    listed = releases.requirements("2.11.0")
    assert listed[0] == "torch==2.11.0"
    assert sum(line.startswith("torch=") for line in listed) == 1
    assert any(line.startswith("lightning") for line in listed)
    assert not any(line.startswith("revnet") for line in listed)


def test_a_new_environment_is_removed(releases, monkeypatch):
    commands = []
    outcomes = iter([0, 0, 0, 0, 1])

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, next(outcomes))

    monkeypatch.setattr(subprocess, "run", run)
    with releases.environment("2.11", None, "python3.13") as python:
        folder = python.parents[1]
        assert folder.exists()
    assert not folder.exists()
    assert commands[0][:3] == ["python3.13", "-m", "venv"]
    assert "torch==2.11.*" in commands[1]
    assert "--no-deps" in commands[2]
    with pytest.raises(SystemExit, match=r"PyTorch 2\.99 was not installed"), releases.environment("2.99", None):
        pass
    assert not Path(commands[3][3]).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["2.11", "--every", "0"], "`--every` (=0) must be at least 1"),
        (["2.11", "--rooms", "n"], "names 'n', but the rooms are"),
        (["2.11", "--env", "2.13=/"], "names the release '2.13', which is not among the arguments"),
        (["2.11", "--env", "2.11=/missing"], "--env 2.11=/missing` is not a virtual environment"),
    ],
)
def test_wrong_arguments(releases, capsys, arguments, message):
    with pytest.raises(SystemExit):
        releases.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_runs_a_room_in_a_given_environment(releases, monkeypatch, tmp_path):
    monkeypatch.setattr(releases, "files_of", lambda _: ["tests/test_units.py"])
    environment = str(Path(sys.executable).parents[1])
    arguments = ["2.13", "--env", f"2.13={environment}", "--rooms", "nn", "--num-workers", "0"]
    assert releases.main([*arguments, "--out-dir", str(tmp_path)]) == 0
    (page,) = tmp_path.glob("releases_*.md")
    assert "| nn |" in page.read_text()
    (table,) = tmp_path.glob("*.csv")
    (whole,) = releases.read_results(table)
    assert whole.failed == 0
    table.unlink()
    assert releases.main([*arguments, "--every", "3", "--out-dir", str(tmp_path)]) == 0
    (sample,) = releases.read_results(table)
    assert sample.passed == -(-whole.passed // 3)
