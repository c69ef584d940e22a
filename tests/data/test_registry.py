from pathlib import Path

import pytest
import torch

from revnet.data import list_datasets, load_dataset
from revnet.errors import DataError


def test_list_is_sorted() -> None:
    assert list_datasets() == ["cifar10", "digits"]


@pytest.mark.parametrize("as_type", [str, Path, "{}/".format], ids=["str", "Path", "trailing slash"])
def test_folders_have_no_need_of_a_name(folder: Path, as_type: type) -> None:
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


def test_name_comes_before_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename(folder.parent / "digits")
    assert load_dataset("digits").image_size == (8, 8)
    assert load_dataset("./digits").image_size == (5, 4)


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("cifar-10", "did you mean 'cifar10'?"),
        ("CIFAR10", "did you mean 'cifar10'?"),
        ("digit", "did you mean 'digits'?"),
        ("imagenet", "pass a name or the path of a folder."),
        ("", "pass a name or the path of a folder."),
        ("x" * 300, "pass a name or the path of a folder."),
    ],
)
def test_unknown_name(name: str, way_out: str) -> None:
    with pytest.raises(ValueError, match="is neither a data set") as caught:
        load_dataset(name)
    expected = f"`name_or_path` (='{name}') is neither a data set of revnet (cifar10, digits) nor a folder; {way_out}"
    assert str(caught.value) == expected
    assert not isinstance(caught.value, DataError)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`path` \(='.*nowhere'\) does not exist; pass the folder that holds"):
        load_dataset(tmp_path / "nowhere")


def test_loading_leaves_the_random_state_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    load_dataset(folder)
    load_dataset("digits")
    assert torch.equal(before, torch.get_rng_state())
