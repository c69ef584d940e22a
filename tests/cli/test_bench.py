"""`revnet bench`: its flags and files. tests/bench tests the measurements."""

from pathlib import Path

import pytest

from revnet import bench
from revnet.bench import Settings
from revnet.bench.host import NUM_QUICK_ROUNDS, NUM_ROUNDS
from revnet.bench.run import QUICK


@pytest.fixture
def calls(monkeypatch):
    """Replace the measurement, and return the calls."""
    calls = []

    def run_benchmark(settings, folder, command):
        calls.append((settings, folder, command))
        return folder / "page.md"

    monkeypatch.setattr(bench, "run_benchmark", run_benchmark)
    return calls


def test_without_options(revnet, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert revnet("bench") == (0, "wrote page.md, its CSV and its pictures\n", "")
    assert calls == [(Settings(), Path(), "revnet bench")]


def test_writes_to_benchmarks_results_if_it_exists(revnet, calls, tmp_path, monkeypatch):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert revnet("bench", "--quick")[0] == 0
    assert calls == [(QUICK, Path("benchmarks/results"), "revnet bench --quick")]


def test_options(revnet, calls):
    assert revnet("bench", "--num-rounds", "7", "--quick", "--out-dir", "somewhere")[0] == 0
    ((settings, folder, command),) = calls
    assert (settings.num_rounds, settings.memory_depths) == (7, QUICK.memory_depths)
    assert (folder, command) == (Path("somewhere"), "revnet bench --quick --num-rounds 7")


@pytest.mark.parametrize(
    ("arguments", "num_rounds"), [([], NUM_ROUNDS), (["--quick"], NUM_QUICK_ROUNDS), (["--num-rounds", "7"], 7)]
)
def test_host(revnet, monkeypatch, tmp_path, arguments, num_rounds):
    calls = []

    def run_host_benchmark(num_rounds, folder, command):
        calls.append((num_rounds, folder, command))
        (folder / "page.md").write_text("the page\n")
        return folder / "page.md"

    monkeypatch.setattr(bench, "run_host_benchmark", run_host_benchmark)
    monkeypatch.chdir(tmp_path)
    assert revnet("bench", "--host", *arguments) == (0, "the page\n\nwrote page.md and its CSV\n", "")
    assert calls == [(num_rounds, Path(), " ".join(["revnet bench --host", *arguments]))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "--device", "cuda"], "`--device` (=cuda) must be cpu with `--host`"),
        (["--num-rounds", "0"], "`--num-rounds` (=0) must be a positive integer."),
        (["--device", "abacus"], "`--device` (=abacus) must be a device, such as cpu or cuda."),
        (["--device", "meta"], "`--device` (=meta) must be cpu or cuda."),
        (["--device", "cuda:99"], "`--device` (=cuda:99) is not available; PyTorch sees "),
        (["--quick", "maybe"], "`--quick` (=maybe) must be true or false."),
    ],
)
def test_usage_errors_print_one_line(assert_refused, calls, arguments, message):
    assert_refused(["bench", *arguments], message)
    assert calls == []
