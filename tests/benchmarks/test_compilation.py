"""`benchmarks/compilation.py` with small settings: its table has a row for each variant."""

import csv
from dataclasses import replace
from importlib import import_module

import pytest

SHAPES = {"conv": (4, 32, 4, 4), "transformer": (2, 8, 256)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch's own, in torch.compile.
def test_writes_a_table(tmp_path, monkeypatch, capsys):
    compilation = import_module("compilation")
    cases = [replace(case, stream_shape=SHAPES[case.name]) for case in compilation.CASES]
    monkeypatch.setattr(compilation, "CASES", cases)
    compilation.main(["--depth", "1", "--num-rounds", "1", "--backend", "eager", "--out-dir", str(tmp_path)])
    (page,) = tmp_path.glob("compilation_*.md")
    assert capsys.readouterr().out == f"{page.read_text()}\n"
    with next(tmp_path.glob("*.csv")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * len(compilation.VARIANTS)
    assert {float(row["ratio"]) for row in rows if row["variant"] == "stored"} == {1.0}


def test_usage_errors(tmp_path):
    compilation = import_module("compilation")
    for arguments in (["--depth", "0"], ["--out-dir", str(tmp_path / "missing")]):
        with pytest.raises(SystemExit):
            compilation.main(arguments)
