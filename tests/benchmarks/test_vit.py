"""`benchmarks/vit.py` with small settings: its tables are written, and its numbers are consistent."""

import csv
import json
from importlib import import_module

import pytest


@pytest.fixture
def finished_run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    summary = {"model": "revvit_cifar", "data": "cifar10", "num_updates": 1500, "batch_size": 100, "test_images": 10000}
    summary |= {"train_seconds": 90.0, "test_accuracy": 0.5, "peak_bytes": 2**20, "stored_peak_bytes": 3 * 2**20}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.csv").write_text("epoch,train_loss,train_accuracy\n1,2.0,0.25\n2,1.5,0.45\n")
    return folder


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
