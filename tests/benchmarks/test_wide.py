"""`benchmarks/wide.py`: the page of a run, and the bytes of its update by policy."""

import csv
from importlib import import_module

import pytest


@pytest.mark.slow
def test_writes_page_and_tables(tmp_path, capsys, finished_run):
    (finished_run / "learning_curve.png").write_bytes(b"picture")
    import_module("wide").main([str(finished_run), "--out-dir", str(tmp_path), "--note", "It was paused."])
    (page,) = tmp_path.glob("wide-cifar10_*.md")
    text = page.read_text()
    assert capsys.readouterr().out == f"{text}\n"
    assert "1,500 updates of 100 images in 1.5" in text
    assert f"]({page.stem}.png)" in text
    assert page.with_suffix(".png").read_bytes() == b"picture"
    assert "- Run: Command: `revnet train`" in text
    assert "\n- It was paused.\n" in text
    assert "| wide RevNet, one seed | 2 | 50.00 % |" in text
    with next(tmp_path.glob("*_memory.csv")).open(newline="") as file:
        rows = {row.pop("policy"): row for row in csv.DictReader(file)}
    for precision in ("float32_bytes", "bf16_bytes"):
        assert int(rows["reversed"][precision]) < int(rows["checkpointed"][precision]) < int(rows["stored"][precision])


def test_needs_a_finished_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        import_module("wide").main([str(tmp_path)])
    assert "is not the folder of a finished run" in capsys.readouterr().err
