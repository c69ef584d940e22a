"""A folder of classes without `train` and `test`."""

import logging
import os
import shutil
import unicodedata
from pathlib import Path

import pytest

from revnet.data import ImageDataset, load_dataset
from revnet.data.decoding.crop import CenterCrop, RandomResizedCrop
from revnet.data.sources.plain_folder import load_plain_folder
from revnet.data.splits.file_split import FileSplit
from revnet.errors import DataError
from tests.data.samples import write_image

COUNTS = {"cat": 12, "dog": 8, "große Tiere": 3}


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Return a folder of three classes with 12, 8 and 3 images."""
    return write_classes(tmp_path / "my pets", COUNTS)


def write_classes(folder: Path, counts: dict[str, int]) -> Path:
    """Write a folder of images for each class."""
    for name, count in counts.items():
        for number in range(count):
            write_image(folder / name / f"{number}.png")
    return folder


def names(split: FileSplit, folder: Path) -> set[str]:
    return {str(Path(split.file(index)).relative_to(folder)) for index in range(len(split))}


def parts(dataset: ImageDataset, folder: Path) -> tuple[set[str], set[str]]:
    return names(dataset.train, folder), names(dataset.test, folder)


def test_a_fifth_of_each_class_is_held_out(pets: Path) -> None:
    dataset = load_dataset(pets, image_size=16)
    assert (dataset.name, dataset.class_names) == ("my pets", tuple(COUNTS))
    train, test = parts(dataset, pets)
    assert len(train | test) == sum(COUNTS.values())
    assert not train & test
    assert dataset.train.labels.bincount().tolist() == [10, 6, 2]
    assert dataset.test.labels.bincount().tolist() == [2, 2, 1]
    assert dataset.train.crop == RandomResizedCrop((0.08, 1.0))
    assert dataset.test.crop == CenterCrop()
    assert dataset.test[0][0].shape == (3, 16, 16)


def test_the_division_never_changes(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "data", {"a": 10, "b": 10})
    assert parts(load_dataset(folder), folder)[1] == {"a/4.png", "a/5.png", "b/1.png", "b/2.png"}
    assert parts(load_dataset(folder, seed=1), folder)[1] == {"a/7.png", "a/8.png", "b/2.png", "b/3.png"}


def test_the_division_depends_on_seed_and_names_alone(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = parts(load_dataset(pets, seed=3), pets)
    assert expected != parts(load_dataset(pets, seed=4), pets)
    elsewhere = tmp_path / "elsewhere" / "data"
    shutil.copytree(pets, elsewhere)
    for file in elsewhere.rglob("*.png"):  # the pixels may change
        write_image(file)
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = list(entries)[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    copy = load_dataset(elsewhere, seed=3)
    assert parts(copy, elsewhere) == expected
    assert copy.division == load_dataset(pets, seed=3).division


def test_composed_and_decomposed_names_are_divided_alike(tmp_path: Path) -> None:
    """macOS stores an umlaut as two characters in some file systems."""
    folders = {form: tmp_path / form for form in ("NFC", "NFD")}
    for form, folder in folders.items():
        for number in range(10):
            for name in ("Bär", "Kühe"):
                write_image(folder / unicodedata.normalize(form, name) / unicodedata.normalize(form, f"ä{number}.png"))
    tests = [
        {unicodedata.normalize("NFC", name) for name in parts(load_dataset(folder), folder)[1]}
        for folder in folders.values()
    ]
    assert tests[0] == tests[1]


def test_no_seed_takes_all_images_for_both_parts(pets: Path) -> None:
    dataset = load_dataset(pets, seed=None)
    train, test = parts(dataset, pets)
    assert train == test
    assert len(test) == sum(COUNTS.values())
    assert dataset.division is None


def test_hidden_and_other_files_are_ignored(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = load_dataset(pets)
    for name in (".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "cat/notes.txt", "cat/._0.png", ".git/x.png"):
        (pets / name).parent.mkdir(exist_ok=True)
        (pets / name).write_bytes(b"")
    dataset = load_dataset(pets)
    assert dataset.division == expected.division
    assert caplog.messages == []


def test_suffixes_in_capitals_and_nested_folders(tmp_path: Path) -> None:
    for name in ("a/1.JPG", "a/more/2.PnG", "a/more/and more/3.jpeg", "b/1.png", "b/2.png"):
        write_image(tmp_path / name)
    assert {name for part in parts(load_dataset(tmp_path), tmp_path) for name in part} == {
        *("a/1.JPG", "a/more/2.PnG", "a/more/and more/3.jpeg", "b/1.png", "b/2.png")
    }


def test_a_link_to_a_parent_is_not_followed(pets: Path) -> None:
    expected = load_dataset(pets).division
    (pets / "cat" / "again").symlink_to(pets / "cat")
    (pets / "cat" / "all").symlink_to(pets)
    dataset = load_dataset(pets)
    assert len(dataset.train) + len(dataset.test) < 2 * sum(COUNTS.values()) + 3
    (pets / "cat" / "all").unlink()
    assert load_dataset(pets).division == expected


def test_odd_names(tmp_path: Path) -> None:
    classes = ["$5 & $6", "a b", "new\nline", "ünïcode", "%s {}", "'quoted'"]
    write_classes(tmp_path, dict.fromkeys(classes, 2))
    (tmp_path / "a b" / "0.png").rename(tmp_path / "a b" / os.fsdecode(b"\xff.png"))
    dataset = load_dataset(tmp_path, image_size=8)
    assert dataset.class_names == tuple(sorted(classes))
    for split in (dataset.train, dataset.test):
        assert [int(split[index][1]) for index in range(len(split))] == list(range(len(classes)))


def test_images_outside_the_classes_are_reported(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image(pets / "cover.jpg")
    with caplog.at_level(logging.WARNING):
        load_dataset(pets)
    assert caplog.messages == [
        f"'{pets}' holds 1 image outside the folders of its classes (the first is 'cover.jpg'), which is not used"
    ]


# ---- folders that cannot be divided


def test_an_empty_class(pets: Path) -> None:
    (pets / "frog").mkdir()
    with pytest.raises(DataError, match=r"^'.*my pets/frog' holds no images \(\.jpg, .*\); add images, or remove"):
        load_dataset(pets)


def test_a_class_with_one_image(pets: Path) -> None:
    write_image(pets / "frog" / "1.png")
    with pytest.raises(DataError, match=r"^'.*my pets/frog' holds a single image, and a class needs two or more"):
        load_dataset(pets)
    assert len(load_dataset(pets, seed=None).test) == 24  # enough to test on


def test_images_without_class_folders(tmp_path: Path) -> None:
    for number in range(6):
        write_image(tmp_path / f"{number}.png")
    with pytest.raises(
        DataError, match=r"^`path` \(='.*'\) holds images but no folder for each class; move the images"
    ):
        load_dataset(tmp_path)


@pytest.mark.parametrize("part", ["val", "Training", "TEST", "validation"])
def test_a_part_of_a_data_set_is_not_a_class(pets: Path, part: str) -> None:
    write_image(pets / part / "cat" / "1.png")
    with pytest.raises(DataError, match=rf"^'.*my pets' has the folder '{part}' but not 'train'; name the folders"):
        load_dataset(pets)


def test_unreadable_paths() -> None:
    with pytest.raises(DataError, match=r"cannot be opened: .*; pass a folder that can be read"):
        load_plain_folder("~unknown_user/data")


def test_images_in_other_formats_are_reported_once(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = sorted(path for path in pets.iterdir() if path.is_dir())
    (folders[0] / "IMG_2.HEIC").write_bytes(b"")
    load_plain_folder(pets)
    assert caplog.messages == [
        f"1 image is left out, because revnet does not read the format (the first is '{folders[0] / 'IMG_2.HEIC'}'); "
        "convert to JPEG or PNG"
    ]
    caplog.clear()
    (folders[1] / "nested").mkdir()
    (folders[1] / "nested" / "IMG_1.avif").write_bytes(b"")
    load_plain_folder(pets)
    assert [message.partition(",")[0] for message in caplog.messages] == ["2 images are left out"]
