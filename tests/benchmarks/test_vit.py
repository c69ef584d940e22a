"""`benchmarks/vit.py` with small settings: its tables are written, and its numbers are consistent."""

import csv
from importlib import import_module

import pytest


def test_writes_tables_and_figure(tmp_path, monkeypatch, capsys, finished_run):
    vit = import_module("vit")
    monkeypatch.setattr(vit, "DEPTHS", (1, 2, 4))
    monkeypatch.setattr(vit, "CIFAR_DEPTHS", (1, 2))
    vit.main([str(finished_run), "--batch-size", "2", "--out-dir", str(tmp_path)])
    (page,) = tmp_path.glob("revvit_*.md")
    text = page.read_text()
    assert capsys.readouterr().out == f"{text}\n"
    (picture,) = tmp_path.glob("*.png")
    assert f"![{picture.name}]({picture.name})" in text
    assert "1,500 updates of 100 images in 1.5" in text
    assert "50.00 % of 10,000 test images" in text

    def rows(name):
        with next(tmp_path.glob(f"*_{name}.csv")).open(newline="") as file:
            return list(csv.DictReader(file))

    assert len({row["reversible_bytes"] for row in rows("depth")}) == 1
    stored = [int(row["stored_bytes"]) for row in rows("depth")]
    assert stored == sorted(set(stored))
    assert all(float(row["round_trip_error"]) < 1e-5 for row in rows("steps"))  # rounding of float32
    assert [row["train_accuracy"] for row in rows("training")] == ["0.25", "0.45"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--out-dir", "nowhere"], "--out-dir nowhere is not a folder"),
        (["nowhere"], "nowhere is not the folder of a finished run"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit):
        import_module("vit").main(arguments)
    assert message in capsys.readouterr().err
