from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from revnet.data import load_dataset
from revnet.errors import DataError

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"no copy of CIFAR-10 in {CIFAR10}")
def test_real_files() -> None:
    cifar10 = load_dataset(CIFAR10)
    assert cifar10.name == "cifar10"
    assert cifar10.train.images.shape == (50_000, 3, 32, 32)
    assert cifar10.test.images.shape == (10_000, 3, 32, 32)
    assert cifar10.train.labels.bincount().tolist() == [5000] * 10
    assert cifar10.test.labels.bincount().tolist() == [1000] * 10
    assert cifar10.class_names[:3] == ("airplane", "automobile", "bird")
    # The well-known means of the three channels; these files were coded as JPEG once more, hence the tolerance.
    mean = torch.stack([channel.sum(dtype=torch.float64) for channel in cifar10.train.images.unbind(1)])
    expected = torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64)
    torch.testing.assert_close(mean / (50_000 * 32 * 32 * 255), expected, atol=5e-4, rtol=0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand-ins for the hub's client: nothing in the cache, no network."""
    stub = SimpleNamespace(cached=[None, None], requests=[])

    def unreachable(*args: object, **kwargs: object) -> None:
        stub.requests.append((args, kwargs))
        raise ConnectionError("name or service not known\nmore lines")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: stub.cached.pop(0))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    return stub


def test_cached_files_need_no_network(folder: Path, hub: SimpleNamespace) -> None:
    hub.cached = [str(file) for file in sorted(folder.iterdir(), reverse=True)]
    cifar10 = load_dataset("cifar10")
    assert cifar10.name == "cifar10"
    assert len(cifar10.train) == 6
    assert hub.requests == []


def test_download(folder: Path, hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = folder / "plain_text"
    inner.mkdir()
    for file in folder.glob("*.parquet"):
        file.rename(inner / file.name)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert len(load_dataset("cifar10").test) == 3


def test_half_cached_files_are_completed_from_the_network(hub: SimpleNamespace) -> None:
    hub.cached = ["/cache/train-00000-of-00001.parquet", None]
    with pytest.raises(DataError, match="cannot be fetched"):
        load_dataset("cifar10")
    assert len(hub.requests) == 1


def test_unreachable_hub(hub: SimpleNamespace) -> None:
    message = (
        r"^`cifar10` cannot be fetched from the Hugging Face hub \(uoft-cs/cifar10\): name or service not known; "
        r"download its parquet files where there is a network, and pass their folder in place of the name\.$"
    )
    with pytest.raises(DataError, match=message):
        load_dataset("cifar10")
    assert len(hub.requests) == 1  # no retries
    assert hub.requests[0][1] == {"timeout": 10}
