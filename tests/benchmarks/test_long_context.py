"""`benchmarks/long_context.py` with small models: the lengths fit, the next ones do not, and the commands say so."""

import csv
from importlib import import_module

import pytest
import torch

from revnet.memory import measure
from revnet.nn import set_policy


@pytest.mark.slow
def test_finds_the_longest_context(tmp_path, monkeypatch, capsys):
    script = import_module("long_context")
    monkeypatch.setattr(script, "SIZES", {"small": script.Size(16, 4, 2, vocab_size=64)})
    monkeypatch.setattr(script, "CARDS", (1, 20))
    monkeypatch.setattr(script, "USABLE", 2**-10)  # of 1 and 20 GiB
    monkeypatch.setattr(script, "UNIT", 64)
    script.main(["--sizes", "small", "--out-dir", str(tmp_path)])
    (page,) = tmp_path.glob("long-context_*.md")
    assert capsys.readouterr().out == f"{page.read_text()}\n"
    with next(tmp_path.glob("*.csv")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["card_gib"]) for row in rows[::2]] == [(name, "1") for name in script.METHODS]
    for row in rows:
        budget, length = int(row["card_gib"]) * 2**20, int(row["longest"])
        policy, is_stepping = script.METHODS[row["method"]]
        model = script.make_model("small")
        set_policy(model, policy)
        peaks = [script.predict_peak(model, size, step_in_backward=is_stepping) for size in (length, length + 64)]
        assert peaks[0] == int(row["peak_bytes"]) <= budget < peaks[1]
        assert ("--step-in-backward" in row["command"]) == is_stepping
        assert f"long_context:small --policy {policy} --batch 1 --input-shape [{length}] " in row["command"]
    lengths = [int(row["longest"]) for row in rows if row["card_gib"] == "20"]
    assert lengths[1] >= lengths[0] > lengths[2] > lengths[3]


def test_the_prediction_is_the_peak_of_a_real_step():
    script = import_module("long_context")
    script.SIZES["tiny"] = script.Size(16, 3, 2, vocab_size=64)
    try:
        model = script.make_model("tiny")
    finally:
        del script.SIZES["tiny"]
    tokens = torch.zeros(1, 96, dtype=torch.int64)
    options = {"kwargs": {"targets": tokens.clone()}, "optimizer": torch.optim.AdamW, "autocast": torch.bfloat16}
    assert script.predict_peak(model, 96, step_in_backward=False) == measure(model, tokens, **options).peak_bytes


@pytest.mark.parametrize(("budget", "units"), [(0, 0), (99, 0), (100, 1), (119, 1), (120, 2), (299, 10), (5000, 246)])
def test_search_ends_at_the_last_length_that_fits(budget, units):
    script = import_module("long_context")
    assert script.longest(lambda size: 80 + 20 * size, budget) == units
    # A peak that bends, as when another part of the step becomes the largest.
    bent = script.longest(lambda size: max(80 + 20 * size, 40 * size - 500), budget)
    assert bent == sum(max(80 + 20 * size, 40 * size - 500) <= budget for size in range(1, 300))
    with pytest.raises(SystemExit):
        script.main(["--out-dir", "missing"])
