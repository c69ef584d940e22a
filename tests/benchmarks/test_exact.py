"""`benchmarks/exact.py` with small settings, and with the published settings, which take minutes."""

import csv
from importlib import import_module

import pytest
import torch

from revnet import ReversibleBlock, ReversibleSequential
from tests.helpers import mlp


@pytest.fixture
def run(tmp_path, capsys):
    def run(*arguments: str) -> tuple[str, list[dict[str, str]]]:
        """Return the page and the rows of the CSV."""
        import_module("exact").main([*arguments, "--out-dir", str(tmp_path)])
        (page,) = tmp_path.glob("*.md")
        (table,) = tmp_path.glob("*.csv")
        assert capsys.readouterr().out.rstrip().endswith(page.read_text().rstrip())
        with table.open(newline="") as file:
            return page.read_text(), list(csv.DictReader(file))

    return run


def assert_every_bit(row, depth):
    assert int(row["inputs_equal"]) == int(row["inputs"]) == 2 * depth
    assert int(row["gradients_equal"]) == int(row["gradients"]) > 8 * depth
    assert int(row["losses_equal"]) == int(row["steps"])
    assert int(row["weights_equal"]) == int(row["weights"]) > 8 * depth


def test_exactness(run):
    page, rows = run("--exactness", "--depth", "6", "--num-steps", "3", "--batch-size", "4")
    assert [(row["kind"], row["precision"]) for row in rows] == [
        (kind, precision) for kind in ("conv", "transformer") for precision in ("32-true", "bf16-mixed")
    ]
    for row in rows:
        assert_every_bit(row, 6)
    assert "| conv | 32-true | 3 | 12 of 12 | 80 of 80 | 3 of 3 | 76 of 76 |" in page


@pytest.mark.slow
def test_depths(run):
    page, rows = run("--depths", "4,16", "--num-steps", "4")
    assert rows[0]["peak_bytes"] == rows[1]["peak_bytes"]
    assert rows[0]["held_bytes"] == rows[1]["held_bytes"]
    assert all(float(row["last_loss"]) < float(row["first_loss"]) for row in rows)
    assert "`python benchmarks/exact.py --depths 4,16 --num-steps 4 --batch-size 8`" in page.replace(
        "`OMP_NUM_THREADS=1 ", "`"
    )


@pytest.mark.slow
def test_cost(run, monkeypatch):
    model = ReversibleSequential(*[ReversibleBlock(mlp(4), mlp(4)) for _ in range(2)])
    monkeypatch.setattr(import_module("exact"), "_workloads", lambda: [("tiny", model, torch.randn(2, 8))])
    page, rows = run("--cost", "--num-steps", "2")
    (row,) = rows
    assert float(row["float"]) == 1
    assert 0 < float(row["check_share"]) < 1
    assert min(float(row[way]) for way in ("exact", "exact_wide", "stored")) > 0
    assert "| tiny |" in page


@pytest.mark.slow
def test_conversion(run, monkeypatch):
    part = import_module("_exact_conversion")
    monkeypatch.setattr(part, "networks", lambda batch_size: [("tiny", *_tiny(batch_size))])
    page, rows = run("--conversion", "--num-steps", "2", "--batch-size", "4")
    assert [row["way"] for row in rows[:3]] == ["ordinary", "Rewire()", "Rewire(), stored"]
    assert len(rows) == 1 + 2 * len(part.METHODS)
    assert float(rows[0]["step"]) == 1
    assert all(float(row["step"]) > 0 for row in rows)
    assert "| tiny | BDIA(0.25), stored |" in page


def _tiny(batch_size):
    network = import_module("_finetuning_nets").SmallGPT(7, dim=8, depth=3)
    tokens = torch.randint(0, 7, (batch_size, 6))
    return network, tokens[:, :-1], tokens[:, 1:]


def test_rejects_an_empty_selection(capsys):
    with pytest.raises(SystemExit, match="2"):
        import_module("exact").main([])
    assert "nothing to measure; pass --exactness, --depths or --cost" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["conv", "transformer"])
def test_a_thousand_blocks_are_exact_after_two_hundred_steps(kind, precision):
    assert_every_bit(import_module("exact").exactness(kind, precision, 1024, 200, 8), 1024)


@pytest.mark.slow
def test_ten_thousand_blocks_use_the_memory_of_ten():
    rows = [import_module("exact").depth_row(depth, 2, 8) for depth in (10, 10_000)]
    assert rows[0]["peak_bytes"] == rows[1]["peak_bytes"]
    assert rows[0]["held_bytes"] == rows[1]["held_bytes"]
    assert rows[1]["last_loss"] < rows[1]["first_loss"]
