"""`benchmarks/conversion.py` with a small model: the original is kept bit for bit, and the page has a table."""

import csv
from importlib import import_module

import torch

from tests.conversion.hosts import Host


def test_conversion_is_compared_with_the_original(tmp_path, monkeypatch):
    script = import_module("conversion")
    case = script.Case("host", Host(3), "blocks", lambda model: None, inputs=(torch.randn(4, 4),))
    monkeypatch.setattr(script, "cases", lambda given: [case])
    monkeypatch.setattr(script, "version", lambda name: "1.0")
    script.main(["--out-dir", str(tmp_path)])
    (page,) = tmp_path.glob("*.md")
    (table,) = tmp_path.glob("*.csv")
    with table.open(newline="") as file:
        rows = {row["way"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["original", "its own checkpointing", *script.METHODS]
    assert all(row["activation_bytes"] == row["predicted_bytes"] for row in rows.values())
    assert rows["Dr2Net(1, 0)"]["equals_original"] == "1"
    assert rows["BDIA(0.25)"]["equals_twin"] == "1"
    assert "3 of 3 blocks are converted" in page.read_text()
