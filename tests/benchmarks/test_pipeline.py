"""`benchmarks/pipeline.py`: the page, and with two processes, which take half a minute, the measurements."""

import csv
from importlib import import_module

import pytest


def test_page_has_a_number_for_each_stage():
    row = {"method": "a", "num_microbatches": 4, "peak_bytes": 2**19, "sent_bytes": 2**20}
    rows = [
        row | {"held_bytes": 2**18, "gradient_difference": 1e-15, "step_seconds": 0.5, "processor_seconds": 0.25},
        row | {"held_bytes": 2**19, "gradient_difference": 2e-15, "step_seconds": 0.6, "processor_seconds": 0.5},
    ]
    lines = import_module("pipeline").section_of(2, rows)
    assert "8 blocks in stages of 5, 3, a stem and a head; microbatches of 4 images." in lines[2]
    assert "| a | 1.0 2.0 | 2.0 2.0 | 1.0 1.0 | 2.0e-15 | 600 | 750 |" in lines


@pytest.mark.slow
def test_two_processes(tmp_path, capsys):
    arguments = ["--num-processes", "2", "--num-microbatches", "2,4", "--num-steps", "1"]
    import_module("pipeline").main([*arguments, "--out-dir", str(tmp_path)])
    (page,) = tmp_path.glob("pipeline_*.md")
    (table,) = tmp_path.glob("pipeline_*.csv")
    assert capsys.readouterr().out.rstrip().endswith(page.read_text().rstrip())
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    held = {(row["method"], row["num_microbatches"], row["stage"]): int(row["held_bytes"]) for row in rows}
    for stage in ("0", "1"):
        assert held["revnet `Pipeline`", "2", stage] == held["revnet `Pipeline`", "4", stage]
        assert held["PyTorch's GPipe, stored", "2", stage] < held["PyTorch's GPipe, stored", "4", stage]
    assert all(float(row["gradient_difference"]) < 1e-13 for row in rows if row["gradient_difference"])
