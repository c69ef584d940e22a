"""`benchmarks/head.py` with small settings: its tables are written, and predicted bytes equal counted bytes."""

import csv
from importlib import import_module

import pytest

SMALL = ["--vocabulary", "300", "--batch", "2", "--length", "32", "--features", "16", "--depth", "1", "--rounds", "1"]


def read(folder, name):
    (path,) = folder.glob(f"head_*_{name}.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_writes_tables(tmp_path, capsys):
    import_module("head").main([*SMALL, "--out-dir", str(tmp_path)])
    (page,) = tmp_path.glob("head_*.md")
    assert capsys.readouterr().out == f"{page.read_text()}\n"
    memory = read(tmp_path, "memory")
    assert all(row["predicted_bytes"] == row["counted_bytes"] for row in memory)
    peaks = {row["loss"]: int(row["counted_bytes"]) for row in memory if row["optimizer"] == "none"}
    assert peaks["chunked"] < peaks["whole"]
    for row in read(tmp_path, "gradients"):
        if row["loss"] in ("whole", "chunked"):
            assert float(row["error_weight"]) < (1e-5 if row["precision"] == "float32" else 0.1)
    seconds = read(tmp_path, "time")
    assert {row["precision"] for row in seconds} == {"float32", "bf16 autocast"}
    assert all(float(row["head_ratio"]) > 0 for row in seconds)


def test_usage_errors(capsys, tmp_path):
    head = import_module("head")
    for arguments, message in (
        (["--vocabulary", "0"], "all numbers must be at least 1"),
        (["--features", "20"], "--features must be a multiple of 16"),
        (["--out-dir", str(tmp_path / "missing")], "is not a folder; create it first"),
    ):
        with pytest.raises(SystemExit):
            head.main(arguments)
        assert message in capsys.readouterr().err
