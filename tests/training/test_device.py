import pytest
import torch

from revnet.training.device import find_device


def test_finds_devices_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cpu", "cuda", "cuda:1"):
        assert find_device(name) == torch.device(name)
    assert find_device("auto") == torch.device("cuda")
    with pytest.raises(
        ValueError, match=r"`device` \(='cuda:2'\) is not available to this PyTorch; pass auto or cpu or"
    ):
        find_device("cuda:2")


def test_auto_takes_the_available_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for has_mps, expected in ((True, "mps"), (False, "cpu")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda has_mps=has_mps: has_mps)
        assert find_device("auto") == torch.device(expected)
    with pytest.raises(ValueError, match=r"`device` \(='mps'\) is not available"):
        find_device("mps")
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    assert find_device("auto") == torch.device("cpu"), "Lightning has no accelerator for it"
    assert find_device("xpu:1") == torch.device("xpu:1")
    with pytest.raises(ValueError, match=r"pass auto or cpu or xpu:0 or xpu:1\."):
        find_device("xpu:2")


@pytest.mark.parametrize(
    ("name", "rule"), [("abacus", "is not a device"), ("", "is not a device"), ("meta", "is of a type")]
)
def test_rejects_other_names(name, rule):
    with pytest.raises(
        ValueError, match=rf"`device` \(='{name}'\) {rule}.*; pass auto, cpu, cuda, cuda:1, xpu, or mps"
    ):
        find_device(name)
