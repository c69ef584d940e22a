import torch

from revnet.memory.step._live import LiveBytes


def test_counts_each_storage_once_until_it_is_freed():
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


def test_ignores_given_tensors():
    x = torch.randn(10)
    with LiveBytes([x]) as counter:
        y = x.view(2, 5)
        x.add_(1)
        assert counter.live_bytes == 0
        del y


def test_follows_storages_that_grow():
    with LiveBytes() as counter:
        x = torch.empty(0)
        x.resize_(10)
        assert counter.live_bytes == 40
        torch.add(torch.ones(20), 1, out=x.resize_(0))
        assert counter.live_bytes == 80
        del x
        assert counter.live_bytes == 0
    assert counter.peak_bytes == 160
