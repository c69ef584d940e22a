"""`benchmarks/attention.py` with small settings: each table is written, and its numbers are consistent."""

import csv
from importlib import import_module

import pytest


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(import_module("attention"), "DIM", 16)

    def run(*arguments: str) -> tuple[str, list[dict[str, str]]]:
        """Return the page and the rows of the only CSV."""
        import_module("attention").main([*arguments, "--out-dir", str(tmp_path)])
        (page,) = tmp_path.glob("*.md")
        (table,) = tmp_path.glob("*.csv")
        for picture in tmp_path.glob("*.png"):
            assert f"![{picture.name}]({picture.name})" in page.read_text()
        with table.open(newline="") as file:
            return page.read_text(), list(csv.DictReader(file))

    return run


@pytest.mark.slow
def test_growth_of_arithmetic(run):
    page, rows = run("--cost", "--lengths", "512,1024", "--num-rounds", "1")
    flops = {(row["attention"], row["length"]): int(row["flops"]) for row in rows}
    ratio = {name: flops[name, "1024"] / flops[name, "512"] for name in ("full", "lsh", "hierarchical")}
    assert ratio["full"] > 3
    assert ratio["lsh"] < 2.3
    assert ratio["hierarchical"] < 2.15
    assert "| hierarchical, L |" in page


@pytest.mark.slow
def test_reversible_memory_is_flat_in_depth(run):
    _, rows = run("--models", "--model-lengths", "128", "--depths", "2,3")
    for attention in ("full", "lsh", "hierarchical"):
        its = [row for row in rows if (row["attention"], row["length"], row["way"]) == (attention, "128", "reversible")]
        assert its[0]["activation_bytes"] == its[1]["activation_bytes"]
        stored = [row for row in rows if (row["attention"], row["length"], row["way"]) == (attention, "128", "stored")]
        assert int(stored[1]["activation_bytes"]) > 1.2 * int(stored[0]["activation_bytes"])


def test_rejects_wrong_counts_before_measuring(run, capsys):
    with pytest.raises(SystemExit) as error:
        run("--cost", "--lengths", "512")
    assert error.value.code == 2
    assert "`--lengths` must have at least two numbers" in capsys.readouterr().err
