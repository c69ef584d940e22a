from pathlib import Path

import pytest
import torch

from revnet.data import list_datasets, load_dataset
from revnet.data.sources.text import load_text
from revnet.data.splits.file_split import FileSplit
from revnet.data.splits.image_split import ImageSplit
from revnet.data.splits.stream_split import StreamSplit
from revnet.errors import DataError
from tests.data.samples import write_image


def test_list_is_sorted() -> None:
    assert list_datasets() == ["cifar10", "cifar100", "digits", "imagenet"]


@pytest.mark.parametrize("as_type", [str, Path, "{}/".format], ids=["str", "Path", "trailing slash"])
def test_a_folder_is_loaded_by_its_path(folder: Path, as_type: type) -> None:
    dataset = load_dataset(as_type(folder))
    assert dataset.name == "pets"
    assert len(dataset.train) == 6


def test_relative_paths_and_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    names = [load_dataset(path).name for path in ("pets", "./pets", "~/pets")]
    monkeypatch.chdir(folder)
    names += [load_dataset(path).name for path in (".", "../pets")]
    assert names == ["pets"] * 5


def test_a_name_takes_precedence_over_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename(folder.parent / "digits")
    assert load_dataset("digits").image_size == (8, 8)
    assert load_dataset("./digits").image_size == (5, 4)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar-10", "did you mean 'cifar10'?"),
        ("CIFAR10", "did you mean 'cifar10'?"),
        ("digit", "did you mean 'digits'?"),
        ("ImageNet1k", "did you mean 'imagenet'?"),
        ("mnist", "pass a name, the path of a folder, or hub:owner/name."),
        ("", "pass a name, the path of a folder, or hub:owner/name."),
        ("x" * 300, "pass a name, the path of a folder, or hub:owner/name."),
    ],
)
def test_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match="is neither a data set") as caught:
        load_dataset(name)
    assert str(caught.value) == (
        f"`name_or_path` (='{name}') is neither a data set of revnet (cifar10, cifar100, digits, imagenet) nor a path; "
        f"{hint}"
    )
    assert not isinstance(caught.value, DataError)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`path` \(='.*nowhere'\) does not exist; pass a folder of images or"):
        load_dataset(tmp_path / "nowhere")


def test_folder_with_an_unknown_layout(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.txt").write_text("not an image")
    for path in (tmp_path, tmp_path / "photos"):
        with pytest.raises(
            DataError, match=rf"^`path` \(='{path}'\) does not hold a data set of a known layout; it must"
        ):
            load_dataset(path)


def test_layouts_are_detected(folder: Path, tmp_path: Path) -> None:
    assert isinstance(load_dataset(folder).train, ImageSplit)
    assert isinstance(load_dataset(folder, image_size=8).train, StreamSplit)
    for name in ("train/a/1.png", "val/a/1.png"):
        write_image(tmp_path / "files" / name)
    assert isinstance(load_dataset(tmp_path / "files").train, FileSplit)
    assert load_dataset(tmp_path / "files").image_size == (224, 224)
    assert load_dataset(tmp_path / "files", image_size=8).image_size == (8, 8)
    archive = tmp_path / "cifar-10-python.tar.gz"  # detected by its name
    archive.write_bytes(b"")
    with pytest.raises(DataError, match=rf"'{archive}' cannot be read to its end as a tar archive"):
        load_dataset(archive)


def test_rejects_an_image_size_for_images_of_one_size(tmp_path: Path) -> None:
    message = r"`image_size` \(=32\) is for images of varying size, but the images of '.*' have one size; leave"
    with pytest.raises(ValueError, match=message):
        load_dataset("digits", image_size=32)
    with pytest.raises(ValueError, match=message):
        load_dataset("cifar100", image_size=32)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path / "cifar-10-python.tar.gz", image_size=32)


@pytest.mark.parametrize("name", ["digits", "imagenet", "hub:owner/name", "nothing", "."])
def test_bad_options_are_rejected_before_anything_is_read(name: str) -> None:
    with pytest.raises(ValueError, match=r"`on_corrupt` \(='drop'\) must be one of stop, skip"):
        load_dataset(name, on_corrupt="drop")
    with pytest.raises(ValueError, match=r"`crop_area` \(=\(0, 1\)\) must be two shares"):
        load_dataset(name, crop_area=(0, 1))
    with pytest.raises(ValueError, match=r"`seed` \(=-1\) must be"):
        load_dataset(name, seed=-1)
    with pytest.raises(ValueError, match=r"`image_size` \(=-5\) must be positive"):
        load_dataset(name, image_size=-5)


def test_loading_keeps_the_random_state(folder: Path) -> None:
    before = torch.get_rng_state()
    load_dataset(folder)
    load_dataset("digits")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("target", "reason"), [("nowhere", "does not exist"), ("link", "leads back to itself")])
def test_a_link_that_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(target)
    for load in (load_dataset, load_text):
        with pytest.raises(
            DataError, match=rf"\(='link'\) is a link to '{target}', which {reason}.*; correct the link"
        ):
            load("link")
