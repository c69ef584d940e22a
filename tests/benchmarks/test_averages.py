"""`benchmarks/averages.py` on a short run."""

import csv
from importlib import import_module

import pytest


@pytest.mark.slow
def test_writes_page_and_table(tmp_path, capsys):
    import_module("averages").main(["--epochs", "2", "--out-dir", str(tmp_path)])
    (page,) = tmp_path.glob("*.md")
    text = page.read_text()
    assert text in capsys.readouterr().out
    assert "\n| 0 | 2 | 24 | " in text
    with (tmp_path / f"{page.stem}.csv").open(newline="") as file:
        _, last = csv.DictReader(file)
    # Chance is 10 %. The averages of PyTorch are at chance, and the network is not.
    assert float(last["PyTorch accuracy"]) == pytest.approx(0.1, abs=0.1)
    assert float(last["revnet accuracy"]) > 0.5
