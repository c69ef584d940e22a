"""`benchmarks/volumes.py` with small settings: its tables are written, and its numbers are consistent."""

import csv
from importlib import import_module

import pytest


@pytest.mark.slow
def test_writes_tables_and_figure(tmp_path, monkeypatch, capsys):
    volumes = import_module("volumes")
    monkeypatch.setattr(volumes, "DEPTHS", (2, 3))
    monkeypatch.setattr(volumes, "BUDGETS_GIB", (1,))
    monkeypatch.setattr(volumes, "SMALL", {**volumes.SMALL, "widths": (4, 8)})
    tiny = ["--size", "16", "--small-size", "8", "--num-updates", "4"]
    volumes.main([*tiny, "--out-dir", str(tmp_path)])
    (page,) = tmp_path.glob("volumes_*.md")
    text = page.read_text()
    assert capsys.readouterr().out == f"{text}\n"
    (picture,) = tmp_path.glob("*.png")
    assert f"![{picture.name}]({picture.name})" in text

    def rows(name):
        with next(tmp_path.glob(f"*_{name}.csv")).open(newline="") as file:
            return list(csv.DictReader(file))

    two, stored_two, three, stored_three = (int(row["activation_bytes"]) for row in rows("depth"))
    assert two == three < stored_two < stored_three
    (fitting,) = rows("size")
    assert int(fitting["reversible_side"]) >= int(fitting["stored_side"]) >= 16
    for row in rows("small"):
        assert row["counted_activation_bytes"] == row["predicted_activation_bytes"]
        assert float(row["round_trip_error"]) < 1e-5  # rounding of float32
    training = rows("training")
    assert [row["updates"] for row in training] == ["0", "1", "2", "4"]
    # They differ by rounding alone.
    assert float(training[-1]["reversible_loss"]) == pytest.approx(float(training[-1]["stored_loss"]), rel=1e-3)


@pytest.mark.parametrize("arguments", [["--size", "24"], ["--small-size", "6"], ["--num-updates", "0"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit):
        import_module("volumes").main(arguments)
    assert (
        "--size must be a multiple of 16, --small-size a multiple of 4, and all numbers at least 1"
        in capsys.readouterr().err
    )
