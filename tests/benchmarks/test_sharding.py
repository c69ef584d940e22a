"""`benchmarks/sharding.py` with small settings."""

import csv
from importlib import import_module

import pytest


@pytest.mark.slow
def test_bytes_fall_with_the_number_of_processes(tmp_path, capsys):
    sizes = ["--depths", "1,3", "--dim", "8", "--batch-size", "4", "--length", "8"]
    import_module("sharding").main([*sizes, "--processes", "1,2", "--num-steps", "1", "--out-dir", str(tmp_path)])
    (page,) = tmp_path.glob("*.md")
    (table,) = tmp_path.glob("*.csv")
    assert page.read_text() in capsys.readouterr().out
    with table.open(newline="") as file:
        rows = {(row["way"], int(row["processes"]), int(row["depth"])): row for row in csv.DictReader(file)}
    for depth in (1, 3):
        one, two, replicated = (
            rows[key] for key in (("sharded by block", 1, depth), ("sharded by block", 2, depth), ("DDP", 2, depth))
        )
        for column in ("parameter_bytes", "gradient_bytes"):
            assert 2 * int(two[column]) == int(one[column]) == int(replicated[column])
    held = [int(rows["sharded by block", 2, depth]["held_bytes"]) for depth in (1, 3)]
    assert held[0] == held[1]
