"""`benchmarks/any_model.py` with a small model: predictions and gradients are exact, and the page has a table."""

import csv
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Network(nn.Module):
    """A perceptron with a switch of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(3)])
        self.is_checkpointing = False

    def switch_on(self):
        self.is_checkpointing = True

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_checkpointing else block(x)
        return x


@pytest.mark.slow
def test_predictions_and_gradients_are_exact(tmp_path, monkeypatch):
    script = import_module("any_model")
    case = script.Case("perceptron", Network(), "switch_on", inputs=(torch.randn(16, 8),))
    monkeypatch.setattr(script, "cases", lambda given, lines: [case])
    monkeypatch.setattr(script, "find_spec", lambda name: True)
    monkeypatch.setattr(script, "version", lambda name: "1.0")
    script.main(["--rounds", "1", "--out-dir", str(tmp_path)])
    (page,) = tmp_path.glob("*.md")
    (table,) = tmp_path.glob("*.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == [
        "unchanged",
        *[f"budget at {share} %" for share in (0, 33, 67)],
        "`switch_on()`",
    ]
    for row in rows:
        assert row["predicted"] == row["measured"]
        assert (row["is_equal"], row["gradients"]) == ("True", "True")
        assert not row["budget"] or int(row["predicted"]) <= int(row["budget"])
    assert page.read_text().count("| perceptron |") == len(rows)
