"""Page, table and figures of a benchmark with tiny workloads."""

import csv
import sys
from itertools import pairwise

import pytest

from revnet.bench import METHODS, Settings, plot, report, run, run_benchmark
from revnet.bench import benchmark as benchmark_module
from revnet.bench.methods import Method
from revnet.bench.run import QUICK, Quartiles
from revnet.errors import MissingDependencyError

SETTINGS = Settings(memory_depths=(2, 4), time_depth=4, num_rounds=2, slow_pitfalls=False)


def fail(*_):
    raise ArithmeticError("on demand\nlong story")


@pytest.fixture(
    params=[
        pytest.param(("plain", "checkpoint", "revnet"), id="few"),
        pytest.param([method.name for method in METHODS], id="all", marks=pytest.mark.slow),
    ]
)
def small(monkeypatch, case, request):
    """Run the tiny case and two pitfalls, with one library that is missing and one method that fails."""
    methods = [method for method in METHODS if method.package is None and not method.is_compiled]
    methods = [method for method in methods if method.name in request.param]
    methods += [Method("absent", "", fail, "no-such-package-of-revnet"), Method("failing", "", fail)]
    for module in (run, report, plot):
        monkeypatch.setattr(module, "METHODS", methods)
        monkeypatch.setattr(module, "CASES", [case], raising=False)
    pitfalls = [run.PITFALLS[0], run.PITFALLS[-1]]
    monkeypatch.setattr(run, "PITFALLS", pitfalls)
    monkeypatch.setattr(report, "PITFALLS", pitfalls)
    monkeypatch.setattr(run, "check_isolated", lambda pitfall, method: pitfall.check(method))
    return methods


def test_writes_all_files(small, tmp_path, capsys):
    page = run_benchmark(SETTINGS, tmp_path / "results", "revnet bench --some-flag")
    stem = page.name.removesuffix(".md")
    assert stem.startswith("engine-quick_cpu")
    names = {path.name for path in page.parent.iterdir()}
    assert names == {f"{stem}{suffix}" for suffix in (".md", ".csv", "_memory.png", "_time.png")}
    text = page.read_text()
    for part in (
        "- Hardware: ",
        "- Versions: PyTorch ",
        "- Date: ",
        "revnet bench --some-flag`",
        ", no-such-package-of-revnet not installed",
    ):
        assert part in text
    assert "pip install --no-deps no-such-package-of-revnet" in text
    assert "`ArithmeticError: on demand`" in text
    assert "| absent | not installed | not installed |" in text
    assert "| failing | failed | failed |" in text
    assert "| torch.compile(fullgraph=True) | not run |" in text
    output = capsys.readouterr().out
    for method in small:
        assert (f"tiny, 4 blocks, {method.name}: " in output) != (method.name == "absent")
    assert output.count("no-such-package-of-revnet") == 2, "the package and the command, once"

    with page.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    cells = {(row["case"], row["depth"], row["method"], row["quantity"]): row for row in rows}
    assert cells["tiny", "4", "plain", "step / plain, median"]["value"] == "1.0"
    assert cells["tiny", "4", "plain", "gradient error to plain"]["value"] == "0.0"
    assert float(cells["tiny", "4", "revnet", "step"]["value"]) > 0
    peaks = {depth: int(cells["tiny", depth, "revnet", "peak"]["value"]) for depth in ("2", "4")}
    assert peaks["2"] == peaks["4"]
    assert cells["tiny", "4", "absent", "peak"]["note"].startswith("not installed")
    assert cells["tiny", "4", "failing", "peak"]["note"] == "ArithmeticError: on demand"
    assert cells["pitfalls", "", "checkpoint", "batch norm counted once"]["value"] == "wrong"
    assert cells["pitfalls", "", "failing", "batch norm counted once"]["value"] == "raises"


def test_time_depth_is_a_memory_depth():
    for settings in (Settings(), QUICK):
        assert settings.time_depth in settings.memory_depths


def test_each_round_starts_with_another_method():
    calls = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def step_seconds(self):
            calls.append(self.name)
            return 1.0

        def forward_seconds(self):
            return 0.5

    seconds, forward = run._rounds({name: Recorder(name) for name in ("plain", "b", "c")}, 3)
    assert "".join(name[0] for name in calls) == "pbc" + "bcp" + "cpb" + "pbc"
    assert seconds == {"plain": [1.0] * 3, "b": [1.0] * 3, "c": [1.0] * 3}
    assert forward == [0.5] * 3


def test_quartiles():
    assert Quartiles.of([3.0]) == Quartiles(3, 3, 3)
    assert Quartiles.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Quartiles(2, 3, 4)


def test_times_are_compared_within_the_round():
    times = run._compare([2.0, 20.0, 3.0], [1.0, 10.0, 1.0], [0.5, 5.0, 0.5])
    assert times.over_plain.median == 2.0
    assert times.over_ideal.median == pytest.approx(2 / 1.5)
    assert times.median_over_plain_median == 3.0


def test_spread_keeps_the_order_of_labels():
    heights = plot._spread([0.5, 0.5, 0.1, 0.52], spacing=0.1)
    in_order = sorted(range(4), key=lambda index: heights[index])
    assert in_order[0] == 2
    assert in_order[-1] == 3
    ordered = sorted(heights)
    assert min(b - a for a, b in pairwise(ordered)) > 0.1 - 1e-6


def test_requires_matplotlib_before_measuring(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(benchmark_module, "measure_all", fail)
    with pytest.raises(MissingDependencyError, match="needs matplotlib, which is not installed"):
        run_benchmark(SETTINGS, tmp_path, "revnet bench")
