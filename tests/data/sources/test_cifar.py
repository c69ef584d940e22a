from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from revnet.data import ImageDataset, load_dataset
from revnet.data.sources.cifar import load_cifar10, load_cifar100
from revnet.errors import DataError
from tests.data.samples import random_images

CIFAR10 = Path(__file__).parents[4] / "shared" / "data" / "cifar10"


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"no copy of CIFAR-10 in {CIFAR10}")
def test_real_files() -> None:
    cifar10 = load_dataset(CIFAR10)
    assert cifar10.name == "cifar10"
    assert cifar10.train.images.shape == (50_000, 3, 32, 32)
    assert cifar10.test.images.shape == (10_000, 3, 32, 32)
    assert cifar10.train.labels.bincount().tolist() == [5000] * 10
    assert cifar10.test.labels.bincount().tolist() == [1000] * 10
    assert cifar10.class_names[:3] == ("airplane", "automobile", "bird")
    # The published means of the channels. The tolerance is needed since these files went through JPEG.
    mean = torch.stack([channel.sum(dtype=torch.float64) for channel in cifar10.train.images.unbind(1)])
    expected = torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64)
    torch.testing.assert_close(mean / (50_000 * 32 * 32 * 255), expected, atol=5e-4, rtol=0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace the client of the hub by one with an empty cache and without a network."""
    stub = SimpleNamespace(cached=[None] * 4, requests=[])

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


@pytest.mark.parametrize(
    ("load", "name", "repository", "folder"),
    [
        (load_cifar10, "cifar10", "uoft-cs/cifar10", "plain_text"),
        (load_cifar100, "cifar100", "uoft-cs/cifar100", "cifar100"),
    ],
)
def test_files_of_the_hub(
    load: Callable[[], ImageDataset],
    name: str,
    repository: str,
    folder: str,
    tmp_path: Path,
    write_parquet: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requested = []

    def cached(repo_id: str, file: str, repo_type: str) -> str:
        requested.append((repo_id, file, repo_type))
        return str(tmp_path / file)

    label_column = "label" if name == "cifar10" else "fine_label"
    for part, num_images in (("train", 4), ("test", 2)):
        file = tmp_path / folder / f"{part}-00000-of-00001.parquet"
        write_parquet(
            file,
            random_images(num_images, height=32, width=32),
            [0, 1] * (num_images // 2),
            class_names=("apple", "pear"),
            label_column=label_column,
        )
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    dataset = load()
    assert dataset.name == name
    assert dataset.image_size == (32, 32)
    assert dataset.class_names == ("apple", "pear")
    assert dataset.train.labels.tolist() == [0, 1, 0, 1]
    assert requested == [
        (repository, f"{folder}/{part}-00000-of-00001.parquet", "dataset") for part in ("train", "test")
    ]


def test_corrupt_images_can_be_skipped(
    tmp_path: Path,
    write_parquet: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    images = [*random_images(3), {"bytes": b"not an image", "path": None}]
    for part in ("train", "test"):
        write_parquet(tmp_path / "plain_text" / f"{part}-00000-of-00001.parquet", images, [0, 1, 2, 2])
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda _, file, **__: str(tmp_path / file))
    with pytest.raises(DataError, match=r"row 3 of '.*train-00000-of-00001\.parquet'"):
        load_cifar10()
    assert load_cifar10(on_corrupt="skip").train.labels.tolist() == [0, 1, 2]
    assert "skipped row 3 of" in caplog.text


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
        r"download its parquet files where there is a network, and pass their folder instead of the name\.$"
    )
    with pytest.raises(DataError, match=message):
        load_dataset("cifar10")
    with pytest.raises(
        DataError, match=r"^`cifar100` cannot be fetched from the Hugging Face hub \(uoft-cs/cifar100\):"
    ):
        load_cifar100()
    assert len(hub.requests) == 2  # no retries
    assert hub.requests[0][1] == {"timeout": 10}
