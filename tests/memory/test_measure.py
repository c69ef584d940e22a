import pytest
import torch
from torch import nn

from revnet.memory import LiveBytes, format_bytes, measure


def test_live_bytes_counts_storages_once_and_sees_them_go():
    with LiveBytes() as counter:
        a = torch.zeros(1000)
        assert counter.live_bytes == 4000
        view = a[:10].view(2, 5)
        assert counter.live_bytes == 4000
        b = a + 1
        assert counter.live_bytes == 8000
        del a
        assert counter.live_bytes == 8000, "the view still sees it"
        del view
        assert counter.live_bytes == 4000
        b.add_(1)
        assert counter.live_bytes == 4000
        del b
    assert counter.live_bytes == 0
    assert counter.peak_bytes == 8000


def test_ignored_tensors_do_not_count():
    x = torch.randn(10)
    with LiveBytes([x]) as counter:
        y = x.view(2, 5)
        x.add_(1)
        assert counter.live_bytes == 0
        del y


def test_measure_a_layer_by_hand():
    """tanh keeps its output; the backward pass adds the expanded gradient of the sum and tanh's gradient."""
    model = nn.Sequential(nn.Linear(100, 50, bias=False), nn.Tanh())
    memory = measure(model, torch.randn(10, 100))
    activation = 10 * 50 * 4
    assert memory.held_bytes == activation + 4  # tanh's output and the loss
    weight_gradient = 50 * 100 * 4
    assert memory.peak_bytes == activation + weight_gradient + 8  # tanh's gradient, the loss and its gradient


def test_measure_needs_something_to_train():
    with pytest.raises(ValueError, match=r"`model` \(=Linear\) has no output that requires a gradient"):
        measure(nn.Linear(2, 2).requires_grad_(False), torch.randn(1, 2))


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3_355_443, "3.2 MiB"), (5 * 2**30, "5.00 GiB")],
)
def test_format_bytes(num_bytes, text):
    assert format_bytes(num_bytes) == text
