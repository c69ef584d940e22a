import logging
import os
from pathlib import Path

import pytest
import torch

from revnet._image_files import is_image_folder
from revnet.data import load_dataset
from revnet.data.decoding.crop import CenterCrop, RandomResizedCrop
from revnet.data.sources.image_folder import load_image_folder
from revnet.data.splits.file_split import FileSplit
from revnet.errors import DataError
from tests.data.samples import write_image

IMAGENET_SAMPLE = Path(__file__).parents[4] / "shared" / "data" / "imagenet-sample"


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Return the path of a data set: two classes, 3 + 2 images for training, one each for testing."""
    folder = tmp_path / "pets"
    for name in ("train/dog/b.png", "train/dog/a.JPG", "train/dog/c.bmp", "train/cat/1.jpeg", "train/cat/2.WebP"):
        write_image(folder / name)
    write_image(folder / "val/dog/x.png")
    write_image(folder / "val/cat/y.tiff")
    return folder


def names(split: FileSplit) -> list[str]:
    return [Path(split.file(index)).name for index in range(len(split))]


@pytest.mark.skipif(not IMAGENET_SAMPLE.is_dir(), reason=f"no sample of ImageNet in {IMAGENET_SAMPLE}")
def test_sample_of_imagenet(caplog: pytest.LogCaptureFixture) -> None:
    dataset = load_dataset(IMAGENET_SAMPLE)
    assert dataset.name == "imagenet-sample"
    assert len(dataset.train) == 1000
    assert len(dataset.test) == 100
    assert dataset.num_classes == 1000
    assert dataset.class_names[:2] == ("n01440764", "n01443537")
    assert (dataset.in_channels, *dataset.image_size) == (3, 224, 224)
    image, label = dataset.test[1]
    assert image.shape == (3, 224, 224)
    assert dataset.class_names[label] in dataset.test.file(1)
    assert caplog.messages == [
        f"'{IMAGENET_SAMPLE / 'val'}' has no folder for 900 of 1000 classes (the first is 'n01443537'): the test "
        "accuracy covers only the others"
    ]


def test_classes_files_and_labels(pets: Path) -> None:
    dataset = load_image_folder(pets)
    assert dataset.name == "pets"
    assert dataset.class_names == ("cat", "dog")
    assert names(dataset.train) == ["1.jpeg", "2.WebP", "a.JPG", "b.png", "c.bmp"]
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert dataset.test.labels.tolist() == [0, 1]
    assert dataset.train.crop == RandomResizedCrop((0.08, 1.0))
    assert dataset.test.crop == CenterCrop(0.875)
    assert load_image_folder(pets, name="mine").name == "mine"


def test_options(pets: Path) -> None:
    dataset = load_image_folder(pets, image_size=32, on_corrupt="skip", crop_area=(0.5, 1.0))
    assert dataset.image_size == (32, 32)
    assert dataset.train.crop == RandomResizedCrop((0.5, 1.0))
    assert dataset.train.on_corrupt == "skip"
    assert dataset.test[0][0].shape == (3, 32, 32)
    with pytest.raises(ValueError, match=r"`image_size` \(=0\) must be positive; pass 224"):
        load_image_folder(pets, image_size=0)
    with pytest.raises(ValueError, match=r"`on_corrupt` \(='ignore'\) must be one of stop, skip"):
        load_image_folder(pets, on_corrupt="ignore")
    with pytest.raises(ValueError, match="`crop_area`"):
        load_image_folder(pets, crop_area=(0.0, 1.0))


@pytest.mark.parametrize("name", ["val", "test", "validation", "valid"])
def test_names_of_the_test_split(pets: Path, name: str) -> None:
    (pets / "val").rename(pets / name)
    assert len(load_dataset(pets).test) == 2


def test_labeled_test_images_take_precedence_over_validation_images(pets: Path) -> None:
    write_image(pets / "test" / "ILSVRC2012_test_00000001.JPEG")  # without labels
    assert len(load_image_folder(pets).test) == 2
    write_image(pets / "test" / "cat" / "1.png")
    write_image(pets / "test" / "dog" / "1.png")
    write_image(pets / "test" / "dog" / "2.png")
    assert len(load_image_folder(pets).test) == 3


def test_ignored_files(pets: Path) -> None:
    for name in ("train/cat/Thumbs.db", "train/cat/.hidden.png", "train/cat/._1.jpeg", "train/README.txt"):
        (pets / name).write_bytes(b"")
    (pets / "train" / ".ipynb_checkpoints").mkdir()
    (pets / "train" / "cat" / ".cache").mkdir()
    write_image(pets / "train" / "cat" / ".cache" / "3.png")
    assert len(load_image_folder(pets).train) == 5


def test_folders_inside_a_class_and_links(pets: Path, tmp_path: Path) -> None:
    write_image(pets / "train" / "cat" / "kittens" / "3.png")
    (tmp_path / "elsewhere").mkdir()
    write_image(tmp_path / "elsewhere" / "4.png")
    (pets / "train" / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (pets / "train" / "cat" / "5.png").symlink_to(pets / "train" / "dog" / "b.png")
    assert load_image_folder(pets).train.labels.tolist() == [0] * 5 + [1] * 3


def test_odd_names(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("a b", "ü", "[x]", "%20", "日本"):
            write_image(tmp_path / part / name / "a [1] ü.png")
    (tmp_path / "train" / "ü" / "a [1] ü.png").rename(tmp_path / "train" / "ü" / os.fsdecode(b"\xff.png"))
    dataset = load_image_folder(tmp_path)
    assert dataset.class_names == tuple(sorted(["a b", "ü", "[x]", "%20", "日本"]))
    for split in (dataset.train, dataset.test):
        assert [int(label) for _, label in (split[index] for index in range(5))] == [0, 1, 2, 3, 4]


def test_a_missing_test_class_is_logged_once(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    (pets / "val" / "cat" / "y.tiff").unlink()
    (pets / "val" / "cat").rmdir()
    with caplog.at_level(logging.WARNING):
        assert load_image_folder(pets).test.labels.tolist() == [1]
    assert caplog.messages == [
        f"'{pets / 'val'}' has no folder for 1 of 2 classes (the first is 'cat'): the test accuracy covers "
        "only the others"
    ]


def test_images_outside_the_folders_of_classes_are_logged(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train/b.png", "train/a.jpg", "val/c.png", "cover.png"):
        write_image(pets / name)
    with caplog.at_level(logging.WARNING):
        assert len(load_image_folder(pets).train) == 5
    outside = "outside the folders of its classes (the first is"
    assert caplog.messages == [
        f"'{pets / 'train'}' holds 2 images {outside} 'a.jpg'), which are not used",
        f"'{pets / 'val'}' holds 1 image {outside} 'c.png'), which is not used",
    ]


# ---- bad folders


def test_class_only_in_the_test_folder(pets: Path) -> None:
    write_image(pets / "val" / "frog" / "1.png")
    with pytest.raises(DataError, match=r"^'.*val/frog' is a class that '.*train' does not have; add training"):
        load_image_folder(pets)


@pytest.mark.parametrize("part", ["train", "val"])
def test_class_without_images(pets: Path, part: str) -> None:
    for file in (pets / part / "cat").iterdir():
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(DataError, match=rf"^'.*{part}/cat' holds no images \(\.jpg, .*\); add images, or remove"):
        load_image_folder(pets)


def test_images_without_class_folders(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "1.png")
    write_image(tmp_path / "val" / "1.png")
    with pytest.raises(
        DataError, match=r"`path` \(='.*'\) must hold 'train', with one folder of images for each class"
    ):
        load_dataset(tmp_path)


def test_no_test_folder(pets: Path) -> None:
    (pets / "val").rename(pets / "holdout")
    with pytest.raises(DataError, match=r"'.*pets' must hold test, val, validation or valid next to 'train', with one"):
        load_dataset(pets)


def test_test_images_without_class_folders(pets: Path) -> None:
    write_image(pets / "test" / "1.png")
    (pets / "val").rename(pets / "holdout")
    with pytest.raises(DataError, match="must hold test, val, validation or valid"):
        load_dataset(pets)


@pytest.mark.parametrize("path", ["~unknown_user/data", "x" * 5000], ids=["user", "length"])
def test_unreadable_paths(path: str) -> None:
    assert not is_image_folder(Path(path))
    with pytest.raises(DataError, match=r"cannot be opened: .*; pass a folder that can be read"):
        load_image_folder(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_folder_without_permission(pets: Path) -> None:
    (pets / "train" / "cat").chmod(0)
    try:
        with pytest.raises(DataError, match=r"cannot be opened: .*Permission denied"):
            load_image_folder(pets)
    finally:
        (pets / "train" / "cat").chmod(0o700)


def test_home_and_relative_paths(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(pets.parent))
    monkeypatch.chdir(pets)
    assert [load_dataset(path).name for path in ("~/pets", ".", Path("../pets"))] == ["pets"] * 3


# ---- holdout


def test_holdout_validates_with_the_center_crop(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for number in range(10):
            write_image(tmp_path / "train" / label / f"{number}.png")
        write_image(tmp_path / "val" / label / "0.png")
    dataset = load_image_folder(tmp_path, on_corrupt="skip")
    train, validation = dataset.holdout(0.2, seed=0)
    assert train.labels.bincount().tolist() == [8, 8]
    assert validation.labels.bincount().tolist() == [2, 2]
    assert sorted(map(train.file, range(16))) == [train.file(index) for index in range(16)]
    assert {train.file(i) for i in range(16)} | {validation.file(i) for i in range(4)} == {
        dataset.train.file(i) for i in range(20)
    }
    assert train.crop == dataset.train.crop
    assert validation.crop == CenterCrop()
    assert validation.on_corrupt == "skip"
    assert validation.image_shape == (3, 224, 224)
    again = dataset.holdout(0.2, seed=0)[1]
    assert [again.file(i) for i in range(4)] == [validation.file(i) for i in range(4)]
    torch.testing.assert_close(validation.labels, again.labels)
    with pytest.raises(
        ValueError, match=r"`fraction` \(=0.01\) holds out 1 image of 20, fewer than the 2 classes; pass 0.1"
    ):
        dataset.holdout(0.01, seed=0)
