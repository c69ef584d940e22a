"""`benchmarks/patches.py` with small settings: its table is written, and the patch fits the budget."""

import csv
from importlib import import_module

import pytest


@pytest.mark.slow
def test_writes_a_table(tmp_path, monkeypatch, capsys):
    patches = import_module("patches")
    monkeypatch.setattr(patches, "SMALL", {**patches.SMALL, "widths": (4, 8)})
    monkeypatch.setattr(patches, "WAYS", patches.WAYS[:2])
    monkeypatch.setattr(patches, "NUM_TEST_VOLUMES", 1)
    patches.main(["--size", "16", "--budget", "600KiB", "--num-updates", "2", "--out-dir", str(tmp_path)])
    (page,) = tmp_path.glob("patches_*.md")
    assert capsys.readouterr().out == f"{page.read_text()}\n"
    with next(tmp_path.glob("*.csv")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["weights"] for row in rows] == ["constant", "constant", "whole volume"]
    assert all(0 <= float(row["dice"]) <= 1 for row in rows)
    assert int(rows[0]["patches"]) > 1


def test_usage_errors(capsys, tmp_path):
    patches = import_module("patches")
    for arguments in (["--size", "10"], ["--num-updates", "0"], ["--out-dir", str(tmp_path / "missing")]):
        with pytest.raises(SystemExit):
            patches.main(arguments)
    assert "--size must be a multiple of 4" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no patch fits into 1KiB"):
        patches.main(["--budget", "1KiB", "--out-dir", str(tmp_path)])
