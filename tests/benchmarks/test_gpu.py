"""`benchmarks/gpu.py` without a GPU: every part runs with tiny sizes, and a failure does not stop other parts."""

import csv
import time
from importlib import import_module

import pytest
import torch

from tests.helpers import CASE


@pytest.fixture
def gpu():
    return import_module("gpu")


@pytest.fixture
def setting():
    return import_module("_gpu_part").Setting(torch.device("cpu"), quick=True)


@pytest.fixture
def in_this_process(gpu, monkeypatch, tmp_path):
    """Run the parts in this process, since loading PyTorch in each process takes long."""

    def run_apart(part, setting, seconds):
        path = tmp_path / f"{part.name}.rows"
        gpu.run_here(part, setting, path)
        outcome = gpu.Outcome(part, gpu.read_rows(path))
        if outcome.rows and gpu.ERROR in outcome.rows[-1]:
            outcome.note = outcome.rows.pop()[gpu.ERROR]
        return outcome

    monkeypatch.setattr(gpu, "run_apart", run_apart)


@pytest.fixture
def part(gpu):
    """Return a part that yields one row and then fails or sleeps."""

    def make(name, *, fails=False):
        def rows(setting):
            yield {"number": 1}
            if fails:
                raise ArithmeticError("on demand\nlong story")

        return import_module("_gpu_part").Part(name, f"Title of {name}", 60, rows, lambda rows: [f"{name}: {rows}", ""])

    return make


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo reads it.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # as Inductor loads
def test_dry_run_writes_all_files(gpu, in_this_process, tmp_path, capsys):
    folder = tmp_path / "results"
    folder.mkdir()
    assert gpu.main(["--device", "cpu", "--quick", "--out-dir", str(folder)]) == 0
    (page,) = folder.glob("*.md")
    assert page.name.startswith("gpu-quick_cpu")
    text = page.read_text()
    assert capsys.readouterr().out.rstrip().endswith(text.rstrip())
    assert "- Versions: PyTorch " in text
    assert f"`python benchmarks/gpu.py --device cpu --quick --out-dir {folder}`" in text.replace(
        "`OMP_NUM_THREADS=1 ", "`"
    )
    assert "Not complete" not in text
    tables = {}
    for name, part in gpu.PARTS.items():
        assert f"| {name} | done | " in text
        assert f"## {part.title}\n" in text
        with (folder / f"{page.stem}_{name}.csv").open(newline="") as file:
            tables[name] = list(csv.DictReader(file))
    assert all(row["outcome"] in ("skipped", "passed") for row in tables["tests"])
    assert len(tables["tests"]) > len(CASE)
    assert {row["method"] for row in tables["ratios"]} >= {"plain", "checkpoint", "save_on_cpu", "revnet, Reverse()"}
    assert all(row["step_ratio"] == row["host_ratio"] == "1.0" for row in tables["ratios"] if row["method"] == "plain")
    assert all(row["allocated_bytes"] == row["predicted_bytes"] for row in tables["memory"])
    assert len(tables["models"]) == 3
    for row in tables["batches"]:
        assert int(row["batch"]) > 1
        assert int(row["allocated_bytes"]) <= int(row["budget_bytes"])
    assert len(tables["capture"]) == 2 * 6
    assert {row["difference"] for row in tables["capture"]} == {"none"}  # a CPU has no graphs: both steps are eager
    exact = ("Store()", "Checkpoint()", "Offload()", "Offload(overlap=True)")
    assert {float(row["difference"]) for row in tables["policies"] if row["policy"] in exact} == {0.0}
    assert all(float(row["difference"]) < 1e-5 for row in tables["policies"])
    assert all(float(row["difference"]) < 1e-5 for row in tables["head"] if not row["note"])
    timed = ("ratios", "capture", "policies", "memory", "models", "batches", "transformer")
    assert {row["note"] for name in timed for row in tables[name]} == {""}


def test_a_failure_does_not_stop_other_parts(gpu, in_this_process, setting, part, tmp_path, capsys):
    outcomes = gpu.run_all([part("first", fails=True), part("second")], setting, tmp_path, "gpu.py")
    assert [outcome.note for outcome in outcomes] == ["ArithmeticError: on demand", ""]
    (page,) = tmp_path.glob("*.md")
    text = page.read_text()
    assert "| first | ArithmeticError: on demand | 0 |" in text
    assert "**Not complete: ArithmeticError: on demand**\n\nfirst: [{'number': 1}]" in text
    assert "| second | done | 0 |" in text
    assert len(list(tmp_path.glob("*.csv"))) == 2


def test_no_part_starts_after_the_time_limit(gpu, in_this_process, setting, part, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TOTAL_SECONDS", gpu.LEAST_SECONDS)
    (outcome,) = gpu.run_all([part("late")], setting, tmp_path, "gpu.py")
    assert (outcome.note, outcome.rows) == ("no time left", [])
    assert "**Not complete: no time left**" in next(tmp_path.glob("*.md")).read_text()


def test_time_limits_are_below_eight_minutes(gpu):
    assert gpu.TOTAL_SECONDS + gpu.LEAST_SECONDS <= 8 * 60
    assert list(gpu.PARTS) == [
        *("tests", "ratios", "capture", "policies", "head", "memory", "models", "batches", "transformer")
    ]


def test_a_part_runs_in_a_separate_process(gpu, setting):
    outcome = gpu.run_apart(gpu.MACHINE, setting, 120)
    (row,) = outcome.rows
    assert row["hardware"].startswith("cpu")
    assert not outcome.note


def test_kills_a_process_after_its_time_limit(gpu, setting, part):
    start = time.monotonic()
    outcome = gpu.run_apart(gpu.MACHINE, setting, 0.01)
    assert (outcome.note, outcome.rows) == ("ended after 0 s", [])
    assert time.monotonic() - start < 60
    unknown = gpu.run_apart(part("no such part"), setting, 120)
    assert unknown.note == "exit code 1"


def test_skips_an_incomplete_line(gpu, tmp_path):
    path = tmp_path / "rows"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert gpu.read_rows(path) == [{"a": 1}, {"a": 2}]


def test_outcomes_of_tests(setting, monkeypatch, tmp_path, capsys):
    tests = import_module("_gpu_tests")
    mark = "pytestmark = pytest.mark." + "gpu\n"  # split, since this file has no GPU tests
    (tmp_path / "tests" / "contracts").mkdir(parents=True)
    (tmp_path / "tests" / "contracts" / "test_it.py").write_text(
        f"import pytest\n{mark}def test_a():\n    pass\ndef test_b():\n    assert 1 == 2\n"
        "def test_c():\n    pytest.skip('no')\n"
    )
    (tmp_path / "tests" / "test_more.py").write_text(f"import pytest, no_such_package\n{mark}")
    (tmp_path / "tests" / "test_other.py").write_text("import no_such_package_either")
    monkeypatch.setattr(tests, "ROOT", tmp_path)
    assert tests.files_with_marks(quick=True) == ["tests/contracts/test_it.py"]
    monkeypatch.setattr(tests, "files_with_marks", lambda quick: ["tests/contracts/test_it.py", "tests/test_more.py"])
    collected = []
    with pytest.raises(import_module("_gpu_part").PartError, match="1 tests failed; pytest ended with exit code 1"):
        collected.extend(_until_it_fails(tests.rows(setting), collected))
    outcomes = {row["test"]: row["outcome"] for row in collected if row["outcome"] != "reason"}
    name = "tests/contracts/test_it.py::test_"
    assert outcomes == {f"{name}a": "passed", f"{name}b": "failed", f"{name}c": "skipped"}
    page = "\n".join(tests.lines(collected))
    assert "| tests/contracts/test_it.py | 1 | 1 | 1 |" in page
    assert f"- `{name}b`: assert 1 == 2" in page
    assert "- `tests/test_more.py`: ModuleNotFoundError: No module named 'no_such_package'" in page


def _until_it_fails(rows, collected):
    for row in rows:
        collected.append(row)
    return []


def test_notes_a_step_that_runs_out_of_memory():
    step = import_module("_gpu_step")
    cpu = torch.device("cpu")

    def fail(error):
        raise error

    assert step.attempt(lambda: None, cpu) == ""
    assert step.attempt(lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried ...")), cpu) == "out of memory"
    assert step.attempt(lambda: fail(RuntimeError("no kernel\nlong story")), cpu) == "RuntimeError: no kernel"
    with pytest.raises(ZeroDivisionError):
        step.attempt(lambda: 1 / 0, cpu)


def test_rounds_of_turns(setting):
    step = import_module("_gpu_step")
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    full = import_module("_gpu_part").Setting(torch.device("cpu"), quick=False)
    turns = step.take_turns(steps, full, seconds=60.0)
    assert [len(turns[name]) for name in "abc"] == [step.MOST_ROUNDS] * 3
    assert sorted(calls) == sorted("abc" * (step.NUM_STEPS + 1) * step.MOST_ROUNDS)
    assert [len(seconds) for seconds in step.take_turns(steps, full, seconds=0.0).values()] == [1] * 3
    assert [len(seconds) for seconds in step.take_turns(steps, setting, seconds=60.0).values()] == [1] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "tests,speed"], "unknown part 'speed'; choose from tests, ratios, "),
        (["--device", "cpu"], "--device cpu would take hours; add --quick for a dry run"),
        (
            ["--device", "cpu", "--quick", "--out-dir", "no/such"],
            "--out-dir no/such is not a folder; create it first",
        ),
    ],
)
def test_usage_errors(gpu, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(arguments)
    assert message in capsys.readouterr().err


def test_requires_a_gpu(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.main([])
    assert "PyTorch finds no GPU; pass `--device cpu --quick` for a dry run without one" in capsys.readouterr().err
