"""`benchmarks/finetuning.py` with small networks and tasks."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

METHODS = ("ordinary", "BDIA 1/4", "Dr2Net, ramp to 1/4", "Rewire")


@pytest.fixture
def finetuning(tmp_path, monkeypatch):
    """Return a function that runs the script on one small network."""
    script, nets = import_module("finetuning"), import_module("_finetuning_nets")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 32, 32, generator=generator)
    split = nets.Split(x, torch.arange(64) % 3, x, torch.arange(64) % 3, 3)
    net = replace(
        nets.NETS["vit"],
        make=lambda num_outputs: nets.SmallViT(num_outputs, dim=12, depth=3),
        first=lambda folder: split,
        second=lambda folder: split,
        num_epochs=(1, 2),
        methods=METHODS,
    )
    monkeypatch.setitem(script.NETS, "vit", net)
    monkeypatch.setattr(script, "METHODS", {name: script.METHODS[name] for name in METHODS})
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    arguments = ["--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--nets", "vit", "--seeds", "0"]

    def run(*more):
        script.main([*arguments, *more])
        return [path.read_text() for path in tmp_path.glob("finetuning-vit_*.md")]

    return script, run


@pytest.mark.slow
def test_exact_methods_train_as_the_stored_twin(finetuning, monkeypatch):
    script, run = finetuning
    assert run("--only-run") == []
    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("ran a finished piece again"))
    (page,) = run()
    assert "bit for bit for: checkpointed, BDIA 1/4, Dr2Net, ramp to 1/4." in page
    rows = {line.split("|")[1].strip(): line.split("|") for line in page.splitlines() if line.startswith("| ")}
    assert set(METHODS) <= rows.keys()
    assert [rows[name][5].strip() for name in METHODS[:3]] == ["0"] * 3
    assert float(rows["BDIA 1/4"][6]) < float(rows["ordinary"][6])
