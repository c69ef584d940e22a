"""Pieces of long benchmarks: stored ones are returned, and trainings go on where they stopped."""

from importlib import import_module

import torch
from torch import nn


def test_a_stored_piece_is_not_computed_again(tmp_path):
    pieces = import_module("_pieces").Pieces(tmp_path / "runs")
    calls = []

    def compute():
        calls.append(1)
        return {"losses": [1.0, 2.5], "name": "x"}

    for _ in range(2):
        assert pieces.get("a", {"rate": 0.1, "depths": (1, 2)}, compute) == {"losses": [1.0, 2.5], "name": "x"}
    assert len(calls) == 1
    pieces.get("a", {"rate": 0.2, "depths": (1, 2)}, compute)
    assert len(calls) == 2


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pieces = import_module("_pieces").Pieces(None)
    assert pieces.get("a", {}, lambda: {"x": 1}) == {"x": 1}
    model = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(model.parameters())
    pieces.save("a", {}, model, optimizer, {})
    assert pieces.load("a", {}, model, optimizer) == {}
    assert list(tmp_path.iterdir()) == []


def test_a_training_goes_on_bit_for_bit(tmp_path):
    pieces = import_module("_pieces").Pieces(tmp_path)

    def train(first, last, *, is_new):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        if not is_new:
            assert pieces.load("a", {"rate": 0.1}, model, optimizer) == {"update": first}
        for _ in range(first, last):
            optimizer.zero_grad()
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
        pieces.save("a", {"rate": 0.1}, model, optimizer, {"update": last})
        return list(model.parameters())

    whole = train(0, 6, is_new=True)
    train(0, 3, is_new=True)
    resumed = train(3, 6, is_new=False)
    assert all(map(torch.equal, whole, resumed))
    model = nn.Linear(1, 1)
    assert pieces.load("a", {"rate": 0.2}, model, torch.optim.Adam(model.parameters())) == {}
