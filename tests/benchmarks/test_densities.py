"""`benchmarks/densities.py` on a short run."""

import csv
from importlib import import_module

import pytest

from revnet.training import NiceConfig, train


@pytest.mark.slow
def test_writes_page_and_tables(tmp_path, capsys, monkeypatch):
    settings = {"hidden_dim": 8, "num_couplings": 2, "batch_size": 100, "max_updates": 1}
    run = train(NiceConfig(model="glow", out_dir=str(tmp_path / "run"), **settings), quiet=True).folder
    arguments = [str(run), "--num-images", "12", "--depths", "4,8", "--out-dir", str(tmp_path)]
    arguments += ["--note", "It was short."]
    densities = import_module("densities")
    monkeypatch.setattr(densities, "NUM_JACOBIANS", 2)
    densities.main(arguments)
    (page,) = tmp_path.glob("*.md")
    text = page.read_text()
    assert capsys.readouterr().out.rstrip() == text.rstrip()
    assert "| digits, glow, seed 0 |" in text
    assert "\n- It was short.\n" in text
    with (tmp_path / f"{page.stem}.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["model"], row["images"], row["changed_pixels"]) == ("glow", "12", "0")
    with (tmp_path / f"{page.stem}_depth.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for shallow, deep in zip(rows[::2], rows[1::2], strict=True):
        assert shallow["reverse_bytes"] == deep["reverse_bytes"]
        assert int(shallow["store_bytes"]) < int(deep["store_bytes"])


def test_puts_the_mean_of_the_seeds_next_to_the_published_figure():
    runs = [
        ("cifar10", "nice", 9, 6.0),
        ("cifar10", "nice", 9, 7.0),
        ("cifar10", "nice", 5, 8.0),
        ("digits", "nice", 9, 2.0),
    ]
    columns = ("data", "model", "updates", "test_bits_per_dim")
    results = [{"parameters": 1} | dict(zip(columns, run, strict=True)) for run in runs]
    lines = import_module("densities").next_to_published(results)
    assert "| cifar10, nice | 9 | 2 | 6.5000 ± 0.7071 | 4.48 |" in lines
    assert "| cifar10, nice | 5 | 1 | 8.0000 | 4.48 |" in lines
    assert "| digits, nice | 9 | 1 | 2.0000 |  |" in lines


def test_needs_finished_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        import_module("densities").main([str(tmp_path)])
    assert "is not the folder of a finished run" in capsys.readouterr().err
