"""`benchmarks/highway.py` on tiny networks: its tables and its picture are written, and finished pieces are kept."""

import csv
from importlib import import_module

import pytest

from revnet.models import Highway


def run(folder, *extra):
    arguments = ["--depths", "3", "10", "--updates", "12", "--batch-size", "4", "--out-dir", str(folder)]
    import_module("highway").main([*arguments, "--runs", str(folder / "runs"), *extra])


def read(folder, suffix):
    (path,) = (path for path in folder.glob("highway_*.csv") if path.stem.split("_")[3:] == suffix)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_writes_page_tables_and_picture(tmp_path, capsys, monkeypatch):
    run(tmp_path)
    (page,) = tmp_path.glob("*.md")
    assert page.read_text() in capsys.readouterr().out
    (picture,) = tmp_path.glob("*.png")
    assert f"({picture.name})" in page.read_text()
    losses = read(tmp_path, [])
    assert len(losses) == 5 * 2 * 2
    norms = read(tmp_path, ["gradients"])
    assert len(norms) == 5 * (1 + 8)
    assert all(float(row["gradient_norm"]) > 0 for row in norms)
    memory = {(row["net"], row["num_layers"]): int(row["activation_bytes"]) for row in read(tmp_path, ["memory"])}
    assert memory["RevNet", "6"] == memory["RevNet", "10"]
    assert memory["highway", "3"] < memory["highway", "10"]

    monkeypatch.setattr(Highway, "forward", lambda *args: pytest.fail("a finished piece ran again"))
    monkeypatch.setattr("highway.memory_rows", lambda *args: [{"net": "x", "num_layers": 3, "activation_bytes": 1}] * 2)
    run(tmp_path)
    assert read(tmp_path, []) == losses


def test_usage_errors(tmp_path, capsys):
    for arguments, message in (
        (["--depths", "2"], "--depths must be at least 3"),
        (["--updates", "0"], "must be positive"),
        (["--data", str(tmp_path / "missing")], "--data names no folder that exists"),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, *arguments)
        assert message in capsys.readouterr().err
