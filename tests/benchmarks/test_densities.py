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
    densities = import_module("densities")
    monkeypatch.setattr(densities, "NUM_JACOBIANS", 2)
    densities.main(arguments)
    (page,) = tmp_path.glob("*.md")
    assert capsys.readouterr().out.rstrip() == page.read_text().rstrip()
    with (tmp_path / f"{page.stem}.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["model"], row["images"], row["changed_pixels"]) == ("glow", "12", "0")
    with (tmp_path / f"{page.stem}_depth.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for shallow, deep in zip(rows[::2], rows[1::2], strict=True):
        assert shallow["reverse_bytes"] == deep["reverse_bytes"]
        assert int(shallow["store_bytes"]) < int(deep["store_bytes"])
