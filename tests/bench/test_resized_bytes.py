"""`ResizedBytes` agrees with `revnet.memory.LiveBytes` and also sees resized storages."""

import torch
from torch import nn

from revnet.bench._resized_bytes import ResizedBytes
from revnet.memory.step._live import LiveBytes


def test_agrees_with_live_bytes():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
    x = torch.randn(4, 8)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [x, *model.parameters(), *[parameter.grad for parameter in model.parameters()]]
    counts = []
    for counter in (LiveBytes(known), ResizedBytes(known)):
        with counter:
            loss = model(x).sum()
            held_bytes = counter.live_bytes
            loss.backward()
            del loss
        counts.append((counter.peak_bytes, held_bytes, counter.live_bytes))
    assert counts[0] == counts[1]
    assert counts[0][0] > counts[0][1] > counts[0][2] == 0


def test_sees_resized_storages():
    x = torch.zeros(100, dtype=torch.uint8)
    with ResizedBytes(baseline=[x]) as counter:
        y = torch.zeros(60, dtype=torch.uint8)
        assert counter.live_bytes == 60
        y.untyped_storage().resize_(0)
        assert counter.live_bytes == 0
        x.untyped_storage().resize_(0)
        assert counter.live_bytes == -100
        x.untyped_storage().resize_(100)
        y.untyped_storage().resize_(500)
        torch.zeros(1, dtype=torch.uint8)
        assert counter.peak_bytes == 501
        del y
        assert counter.live_bytes == 0


def test_does_not_count_ignored_tensors():
    x = torch.zeros(100, dtype=torch.uint8)
    with ResizedBytes([x]) as counter:
        assert x.add_(1).view(10, 10).is_contiguous()
        x.untyped_storage().resize_(0)
        assert counter.live_bytes == counter.peak_bytes == 0
