"""`benchmarks/numerics.py` with small settings: each table is written, and its numbers are consistent."""

import csv
from importlib import import_module

import pytest


@pytest.fixture
def run(tmp_path, capsys):
    def run(*arguments: str) -> tuple[str, list[dict[str, str]]]:
        """Return the page and the rows of the only CSV."""
        pytest.importorskip("matplotlib")
        import_module("numerics").main([*arguments, "--out-dir", str(tmp_path)])
        (page,) = tmp_path.glob("*.md")
        (table,) = tmp_path.glob("*.csv")
        assert page.read_text().rstrip().endswith(capsys.readouterr().out.rstrip()[-200:])
        for picture in tmp_path.glob("*.png"):
            assert f"({picture.name})" in page.read_text()
        with table.open(newline="") as file:
            return page.read_text(), list(csv.DictReader(file))

    return run


def test_scaled_weights(run, monkeypatch):
    for name, value in {"DEPTH": 8, "WIDTH": 8, "BATCH": 8, "SCALES": (1, 8)}.items():
        monkeypatch.setattr(import_module("_numerics_scales"), name, value)
    page, rows = run("--scales")
    assert [(row["scale"], row["guard"]) for row in rows] == [
        (scale, guard) for scale in ("1", "8") for guard in ("none", "0.001", "1e-05", "exact")
    ]
    bounds = {"none": 1.0, "exact": 0.0, "0.001": 1e-3, "1e-05": 1e-5}
    assert all(float(row["drift"]) <= bounds[row["guard"]] for row in rows)
    assert all(float(row["gradient_error"]) == 0 for row in rows if row["guard"] == "exact")
    assert "8 blocks, F, G = Linear-tanh-Linear of 8 features" in page


def test_drift_during_training(run, monkeypatch):
    for name, value in {"DEPTH": 3, "WIDTH": 4, "BATCH": 4, "NUM_TIMED": 1}.items():
        monkeypatch.setattr(import_module("_numerics_curves"), name, value)
    _, rows = run("--curves", "--num-steps", "7")
    assert [row["update"] for row in rows] == ["0", "5", "6"] * 4
    assert {float(row["drift"]) for row in rows if row["mode"] == "exact"} == {0}
    assert all(float(row["drift"]) <= 1e-3 for row in rows if "tolerance" in row["mode"])
    assert [row["gradient_error"] != "" for row in rows] == [True, False, True] * 4


def test_accuracy_of_float_and_exact(run):
    page, rows = run("--accuracy", "--data", "digits", "--num-updates", "1", "--seeds", "3")
    assert [(row["mode"], row["seed"], row["updates"]) for row in rows] == [("float", "3", "1"), ("exact", "3", "1")]
    assert "for 1 updates" in page


def test_conditioning(run, monkeypatch):
    for name, value in {"DEPTH": 2, "WIDTH": 4, "BATCH": 4, "SEEDS": (0,)}.items():
        monkeypatch.setattr(import_module("_numerics_conditioning"), name, value)
    _, rows = run("--conditioning", "--num-steps", "2")
    assert [float(row["weight"]) for row in rows] == [0, 1, 10]
    assert len({row["first_drift"] for row in rows}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "one"], "--seeds 'one' must be comma-separated numbers"),
        (["--num-updates", "0"], "updates and steps must be at least 1"),
        (["--out-dir", "nowhere"], "--out-dir nowhere is not a folder; create it first"),
    ],
)
def test_usage_errors(capsys, arguments, message):
    with pytest.raises(SystemExit):
        import_module("numerics").main(arguments)
    assert message in capsys.readouterr().err
