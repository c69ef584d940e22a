"""Page, table and pictures of a benchmark with tiny workloads."""

import csv
import sys
from itertools import pairwise

import pytest

from revnet.bench import CONTENDERS, QUICK, Contender, Settings, plot, report, run, run_benchmark
from revnet.bench import benchmark as benchmark_module
from revnet.bench.run import Quartiles
from revnet.errors import MissingDependencyError

SETTINGS = Settings(memory_depths=(2, 4), time_depth=4, num_rounds=2, slow_traps=False)


def fail(*_):
    raise ArithmeticError("on demand\nlong story")


@pytest.fixture
def small(monkeypatch, case):
    """The tiny case alone; without the peers, but with one that is missing and one that fails; three traps."""
    contenders = [contender for contender in CONTENDERS if contender.package is None]
    contenders += [Contender("absent", "", fail, "no-such-package-of-revnet"), Contender("failing", "", fail)]
    for module in (run, report, plot):
        monkeypatch.setattr(module, "CONTENDERS", contenders)
        monkeypatch.setattr(module, "CASES", [case], raising=False)
    traps = [run.TRAPS[0], run.TRAPS[-1]]
    monkeypatch.setattr(run, "TRAPS", traps)
    monkeypatch.setattr(report, "TRAPS", traps)
    monkeypatch.setattr(run, "check_isolated", lambda trap, contender: trap.check(contender))
    return contenders


def test_everything_is_written(small, tmp_path, capsys):
    page = run_benchmark(SETTINGS, tmp_path / "results", "revnet bench --some-flag")
    stem = page.name.removesuffix(".md")
    assert stem.startswith("engine_cpu")
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
    told = capsys.readouterr().out
    assert all(f"tiny, 4 blocks, {contender.name}: " in told for contender in small)

    with page.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    cells = {(row["case"], row["depth"], row["contender"], row["quantity"]): row for row in rows}
    assert cells["tiny", "4", "plain", "step / plain, median"]["value"] == "1.0"
    assert cells["tiny", "4", "plain", "gradient error to plain"]["value"] == "0.0"
    assert float(cells["tiny", "4", "revnet", "step"]["value"]) > 0
    peaks = {depth: int(cells["tiny", depth, "revnet", "peak"]["value"]) for depth in ("2", "4")}
    assert peaks["2"] == peaks["4"]
    assert cells["tiny", "4", "absent", "peak"]["note"].startswith("not installed")
    assert cells["tiny", "4", "failing", "peak"]["note"] == "ArithmeticError: on demand"
    assert cells["traps", "", "checkpoint", "batch norm counted once"]["value"] == "wrong"
    assert cells["traps", "", "failing", "batch norm counted once"]["value"] == "raises"


def test_settings_measure_memory_where_they_measure_time():
    for settings in (Settings(), QUICK):
        assert settings.time_depth in settings.memory_depths


def test_rounds_begin_with_another_contender_each_time():
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


def test_labels_are_spread_in_their_order():
    places = plot._spread([0.5, 0.5, 0.1, 0.52], spacing=0.1)
    in_order = sorted(range(4), key=lambda index: places[index])
    assert in_order[0] == 2
    assert in_order[-1] == 3
    ordered = sorted(places)
    assert min(b - a for a, b in pairwise(ordered)) > 0.1 - 1e-6


def test_matplotlib_is_asked_for_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(benchmark_module, "measure_all", fail)
    with pytest.raises(MissingDependencyError, match="needs matplotlib, which is not installed"):
        run_benchmark(SETTINGS, tmp_path, "revnet bench")
