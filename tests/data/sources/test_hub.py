"""Tests of streaming, with files on disk instead of the hub; `datasets` streams both in the same way."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import fsspec
import huggingface_hub
import pytest
from datasets import SplitDict, SplitInfo
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from revnet.data import load_dataset, make_loader
from revnet.data.decoding.crop import CenterCrop, RandomResizedCrop
from revnet.data.loading.loader import Loader
from revnet.data.sources.hub import HubRows, load_hub_dataset
from revnet.data.splits.stream_split import StreamSplit
from revnet.errors import DataError
from tests.data.samples import CLASS_NAMES, flat_image, write_image

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

Writer = Callable[..., None]


@pytest.fixture
def hub(tmp_path: Path, write_parquet: Writer, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace the hub by a data set of 12 + 3 images in 4 + 1 files, and record requests."""
    stub = SimpleNamespace(gated=False, error=None, requests=[], num_images={"train": 12, "test": 3})
    for index in range(4):
        images = [flat_image(20 * number, height=9 + number) for number in range(3 * index, 3 * index + 3)]
        write_parquet(tmp_path / f"train-{index}.parquet", images, [0, 1, 2], image_column="image")
    images = [flat_image(20 * number) for number in range(3)]
    write_parquet(tmp_path / "test-0.parquet", images, [2, 1, 0], image_column="image")
    write_parquet(tmp_path / "secret-0.parquet", images, [-1, -1, -1], image_column="image")
    stub.files = {part: sorted(map(str, tmp_path.glob(f"{part}-*"))) for part in ("train", "test", "secret")}
    stub.splits = {"train": "train", "test": "test"}  # name of each split, and prefix of its files

    def dataset_info(self: Any, repository: str, *, timeout: float) -> SimpleNamespace:
        stub.requests.append((repository, timeout))
        if isinstance(stub.error, Exception):
            raise stub.error
        return SimpleNamespace(gated=stub.gated)

    def auth_check(self: Any, repository: str, *, repo_type: str) -> None:
        assert repo_type == "dataset"
        if stub.error:
            raise stub.error(
                "403 Client Error\nCannot access gated repo", response=SimpleNamespace(headers={}, request=None)
            )

    # Seconds that `datasets` waits for its threads at the end of a shuffled stream.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    load = datasets.load_dataset

    def load_dataset(repository: str, *, streaming: bool) -> Any:
        assert streaming
        files = {part: stub.files[name] for part, name in stub.splits.items()}
        splits = load("parquet", data_files=files, streaming=True, cache_dir=str(tmp_path / "cache"))
        info = SplitDict({part: SplitInfo(part, num_examples=stub.num_images.get(part)) for part in stub.splits})
        for rows in splits.values():
            rows.info.splits = info
        return splits

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", auth_check)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return stub


def order(loader: Loader, epoch: int = 0) -> list[tuple[int, int]]:
    """Return the gray level and the label of every image."""
    loader.sampler.set_epoch(epoch)
    return [
        (int(image[0, 0, 0]), int(label))
        for images, labels in loader
        for image, label in zip(images, labels, strict=True)
    ]


EXPECTED = [(20 * number, number % 3) for number in range(12)]


def test_a_data_set_by_address(hub: SimpleNamespace) -> None:
    dataset = load_dataset("hub:owner/pets", image_size=8, on_corrupt="skip", crop_area=(0.5, 1.0))
    assert hub.requests == [("owner/pets", 10)]
    assert dataset.name == "pets"
    assert dataset.class_names == CLASS_NAMES
    assert isinstance(dataset.train, StreamSplit)
    assert dataset.train.labels is None
    assert (len(dataset.train), len(dataset.test)) == (12, 3)
    assert (dataset.in_channels, *dataset.image_size) == (3, 8, 8)
    assert dataset.train.crop == RandomResizedCrop((0.5, 1.0))
    assert dataset.test.crop == CenterCrop()
    assert dataset.train.on_corrupt == "skip"
    assert load_hub_dataset("owner/pets").image_size == (224, 224)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_image_appears_once_per_epoch(hub: SimpleNamespace, num_workers: int) -> None:
    train = load_hub_dataset("owner/pets", image_size=4).train
    loader = make_loader(train, batch_size=4, shuffle=True, seed=0, num_workers=num_workers)
    epochs = [order(loader, epoch) for epoch in range(2)]
    assert [sorted(images) for images in epochs] == [EXPECTED] * 2
    assert epochs[0] != epochs[1]
    resumed = make_loader(train, batch_size=4, shuffle=True, seed=0, num_workers=num_workers)
    assert order(resumed, 1) == epochs[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_continues_after_every_batch(hub: SimpleNamespace, num_workers: int) -> None:
    train = load_hub_dataset("owner/pets", image_size=4).train
    loader, resumed = (
        make_loader(train, batch_size=2, shuffle=True, seed=0, drop_last=True, num_workers=num_workers)
        for _ in range(2)
    )
    whole = order(loader, 1)
    loader.sampler.set_epoch(1)
    for count, state in enumerate([loader.state_dict() for _ in loader], start=1):
        resumed.load_state_dict(state)
        assert order(resumed, 1) == whole[2 * count :]


def test_without_shuffling_images_follow_the_order_of_the_files(hub: SimpleNamespace) -> None:
    loader = make_loader(load_hub_dataset("owner/pets").train, batch_size=4, shuffle=False, seed=0)
    assert order(loader, 0) == order(loader, 1) == EXPECTED


def test_imagenet(hub: SimpleNamespace) -> None:
    hub.splits = {"train": "train", "validation": "test", "test": "secret"}
    hub.num_images = {"train": 12, "validation": 3, "test": 3}
    dataset = load_dataset("imagenet", image_size=4)
    assert hub.requests == [("ILSVRC/imagenet-1k", 10)]
    assert dataset.name == "imagenet"
    assert order(make_loader(dataset.test, batch_size=2, shuffle=False, seed=0)) == [(0, 2), (20, 1), (40, 0)]


@pytest.mark.parametrize("name", ["test", "validation", "valid", "val"])
def test_names_of_the_test_split(hub: SimpleNamespace, name: str) -> None:
    hub.splits = {"train": "train", name: "test"}
    hub.num_images = {"train": 12, name: 3}
    assert len(load_hub_dataset("owner/pets").test) == 3


def test_a_test_split_without_labels_is_ignored(hub: SimpleNamespace) -> None:
    hub.splits = {"train": "train", "test": "secret", "validation": "test"}
    hub.num_images = {"train": 12, "test": 3, "validation": 2}
    assert len(load_hub_dataset("owner/pets").test) == 2
    hub.splits = {"train": "train", "test": "secret"}
    with pytest.raises(DataError, match=r"'owner/pets' does not publish the labels of test; use another data set"):
        load_hub_dataset("owner/pets")


def test_images_in_single_files(tmp_path: Path) -> None:
    write_image(tmp_path / "x.png", flat_image(7))
    rows = datasets.Dataset.from_dict(
        {
            "photo": [
                {"bytes": None, "path": path} for path in (f"memory://{tmp_path}/x.png", str(tmp_path / "x.png"))
            ],
            "kind": [1, 1],
        },
        features=datasets.Features({"photo": datasets.Image(decode=False), "kind": datasets.Value("int64")}),
    )
    fsspec.filesystem("memory").pipe(f"{tmp_path}/x.png", (tmp_path / "x.png").read_bytes())
    first, second = HubRows("owner/pets", rows.to_iterable_dataset(), "photo", "kind").read(None, 0, 1)
    assert first.encoded == (tmp_path / "x.png").read_bytes()
    assert first.name == f"'memory://{tmp_path}/x.png' in 'owner/pets'"
    assert second.encoded == b""  # local paths are ignored


# ---- errors


def test_a_damaged_image_is_named(hub: SimpleNamespace, tmp_path: Path, write_parquet: Writer) -> None:
    bad = {"bytes": b"text", "path": "dog_17.jpg"}
    write_parquet(tmp_path / "test-0.parquet", [flat_image(0), bad], [0, 1], image_column="image")
    loader = make_loader(load_hub_dataset("owner/pets").test, batch_size=2, shuffle=False, seed=0)
    with pytest.raises(DataError, match=r"^'dog_17\.jpg' in 'owner/pets' cannot be decoded: it is not an image; "):
        order(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_interrupted_stream(hub: SimpleNamespace, num_workers: int) -> None:
    train = load_hub_dataset("owner/pets", image_size=4).train
    Path(hub.files["train"][3]).unlink()
    loader = make_loader(train, batch_size=2, shuffle=False, seed=0, num_workers=num_workers)
    with pytest.raises(
        DataError, match=r"^the stream of 'owner/pets' was interrupted: [^\n]+; check the network, and resume\.$"
    ):
        order(loader)


def test_gated(hub: SimpleNamespace) -> None:
    hub.gated, hub.error = "manual", GatedRepoError
    message = (
        r"^'ILSVRC/imagenet-1k' is gated: accept its terms at https://huggingface.co/datasets/ILSVRC/imagenet-1k, "
        r"create a token at https://huggingface.co/settings/tokens, and log in with `hf auth login` "
        r"\(or set HF_TOKEN\)\.$"
    )
    with pytest.raises(DataError, match=message):
        load_dataset("imagenet")
    hub.error = None
    hub.splits["validation"] = hub.splits.pop("test")
    hub.num_images["validation"] = 3
    assert load_dataset("imagenet").num_classes == 3  # with the right token


def test_unreachable_or_unknown(hub: SimpleNamespace) -> None:
    hub.error = ConnectionError("name or service not known\nmore lines")
    with pytest.raises(
        DataError,
        match=r"^'owner/pets' cannot be streamed from the Hugging Face hub: name or service not known; check the",
    ):
        load_dataset("hub:owner/pets")
    hub.error = RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
    with pytest.raises(
        DataError, match=r"^'owner/pets' is not a data set on .* that you can access; check its address, or"
    ):
        load_dataset("hub:owner/pets")


def test_missing_splits(hub: SimpleNamespace) -> None:
    hub.splits = {"train": "train", "dev": "test"}
    with pytest.raises(
        DataError, match=r"'owner/pets' has the splits train, dev; it must have `train` and one of test,"
    ):
        load_hub_dataset("owner/pets")


def test_an_unknown_number_of_images(hub: SimpleNamespace) -> None:
    hub.num_images = {"test": 3}
    with pytest.raises(
        DataError, match=r"the card of 'owner/pets' does not state how many images `train` has, .* folder"
    ):
        load_hub_dataset("owner/pets")


@pytest.mark.parametrize(
    ("columns", "counts"),
    [({"text": datasets.Value("string")}, "0 and 0"), ({"a": datasets.Image(), "b": datasets.Image()}, "2 and 0")],
)
def test_data_sets_of_another_kind(hub: SimpleNamespace, columns: dict[str, Any], counts: str) -> None:
    rows = {name: [None] for name in columns}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
    for files in hub.files.values():
        table.to_parquet(files[0])
    hub.files["train"] = hub.files["train"][:1]
    with pytest.raises(
        DataError, match=rf"'owner/pets' has the columns {', '.join(columns)}; .*, but has {counts}; pass"
    ):
        load_hub_dataset("owner/pets")


@pytest.mark.parametrize("address", ["", "pets", "owner/", "owner/pets/train", "https://hf.co/owner/pets"])
def test_rejects_bad_addresses(address: str) -> None:
    with pytest.raises(ValueError, match=r"`repository` \(='.*'\) must be an address on .* pass owner/name") as caught:
        load_dataset(f"hub:{address}")
    assert not isinstance(caught.value, DataError)


def test_rejects_bad_options() -> None:
    with pytest.raises(ValueError, match=r"`image_size` \(=0\) must be positive"):
        load_hub_dataset("owner/pets", image_size=0)
    with pytest.raises(ValueError, match="`on_corrupt`"):
        load_hub_dataset("owner/pets", on_corrupt="")
    with pytest.raises(ValueError, match="`crop_area`"):
        load_hub_dataset("owner/pets", crop_area=(1.0, 0.5))
