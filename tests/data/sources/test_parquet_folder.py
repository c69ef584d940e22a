import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch

from revnet.data.decoding.crop import CenterCrop, RandomResizedCrop
from revnet.data.sources.parquet_folder import load_parquet_folder
from revnet.data.splits.stream_split import StreamSplit
from revnet.errors import DataError, MissingDependencyError
from tests.data.samples import CLASS_NAMES, encode, random_images

Writer = Callable[..., None]

TRAIN = "train-00000-of-00001.parquet"
TEST = "test-00000-of-00001.parquet"


def test_pixels_labels_and_names(folder: Path) -> None:
    dataset = load_parquet_folder(folder)
    assert torch.equal(dataset.train.images, random_images(6))
    assert torch.equal(dataset.test.images, random_images(3, seed=1))
    assert dataset.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.test.labels.tolist() == [2, 1, 0]
    assert dataset.class_names == CLASS_NAMES
    assert dataset.name == "pets"


def test_given_name_wins(folder: Path) -> None:
    assert load_parquet_folder(folder, name="mine").name == "mine"


@pytest.mark.parametrize("inner", ["plain_text", "data"])
def test_files_in_a_folder_inside(folder: Path, inner: str) -> None:
    (folder / inner).mkdir()
    for file in folder.glob("*.parquet"):
        file.rename(folder / inner / file.name)
    (folder / "README.md").write_text("the card of the data set")
    dataset = load_parquet_folder(folder)
    assert dataset.name == "pets"
    assert len(dataset.test) == 3


@pytest.mark.parametrize("name", ["pe[t]s", "pets*", "p?ts", "my pets", ".pets", "__pets__", "p%20#"])
def test_folder_names_are_not_patterns(folder: Path, name: str) -> None:
    # `folder` itself matches some of them.
    other = folder.parent / "other" / name
    other.parent.mkdir()
    folder.rename(other)
    assert len(load_parquet_folder(other).train) == 6


def test_symbolic_links_are_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(folder)
    files = tmp_path / "linked_files"
    files.mkdir()
    for file in folder.iterdir():
        (files / file.name).symlink_to(file)
    assert load_parquet_folder(tmp_path / "linked").name == "linked"
    assert len(load_parquet_folder(files).train) == 6


def test_several_files_per_split_are_joined_in_order(tmp_path: Path, write_parquet: Writer) -> None:
    images = random_images(5)
    write_parquet(tmp_path / "train-00000-of-00002.parquet", images[:2], [0, 1])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", images[2:], [2, 2, 0])
    write_parquet(tmp_path / TEST, images[:1], [0])
    dataset = load_parquet_folder(tmp_path)
    assert torch.equal(dataset.train.images, images)
    assert dataset.train.labels.tolist() == [0, 1, 2, 2, 0]


def test_more_rows_than_one_chunk(tmp_path: Path, write_parquet: Writer) -> None:
    images = random_images(1500, channels=1, height=1, width=1)
    write_parquet(tmp_path / TRAIN, images, [i % 3 for i in range(1500)])
    write_parquet(tmp_path / TEST, images[:1], [0])
    dataset = load_parquet_folder(tmp_path)
    assert dataset.image_size == (1, 1)
    assert torch.equal(dataset.train.images, images)


@pytest.mark.parametrize("image_column", ["img", "image"])
@pytest.mark.parametrize("label_column", ["label", "fine_label"])
def test_other_layouts_of_the_hub(tmp_path: Path, write_parquet: Writer, image_column: str, label_column: str) -> None:
    columns = {"image_column": image_column, "label_column": label_column}
    write_parquet(tmp_path / TRAIN, random_images(2, channels=1), [0, 1], class_names=["a", "b"], **columns)
    write_parquet(tmp_path / TEST, random_images(1, channels=1), [1], class_names=["a", "b"], **columns)
    dataset = load_parquet_folder(tmp_path)
    assert dataset.in_channels == 1
    assert dataset.class_names == ("a", "b")


@pytest.mark.parametrize("label_type", ["int64", "uint8", "uint64"])
def test_classes_without_names_are_numbered(tmp_path: Path, write_parquet: Writer, label_type: str) -> None:
    write_parquet(tmp_path / TRAIN, random_images(3), [2, 0, 1], class_names=None, label_type=label_type)
    write_parquet(tmp_path / TEST, random_images(1), [2], class_names=None, label_type=label_type)
    dataset = load_parquet_folder(tmp_path)
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.train.labels.tolist() == [2, 0, 1]


def test_columns_without_metadata(tmp_path: Path, write_parquet: Writer) -> None:
    rows = {"img": [{"bytes": encode(image), "path": "x.png"} for image in random_images(2)], "label": [1, 0]}
    for name in (TRAIN, TEST):
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / name)
    assert torch.equal(load_parquet_folder(tmp_path).train.images, random_images(2))


def test_nothing_is_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    cache.mkdir()
    scratch.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    before = sorted(folder.iterdir())
    load_parquet_folder(folder)
    assert sorted(folder.iterdir()) == before
    assert list(cache.iterdir()) == []
    assert list(scratch.iterdir()) == []


def test_validation_files_instead_of_test_files(folder: Path, write_parquet: Writer) -> None:
    (folder / TEST).rename(folder / "validation-00000-of-00001.parquet")
    assert len(load_parquet_folder(folder).test) == 3
    write_parquet(folder / TEST, random_images(2), [-1, -1])  # as in ImageNet, whose test labels are not published
    assert len(load_parquet_folder(folder).test) == 3
    write_parquet(folder / TEST, random_images(2), [0, 1])
    assert len(load_parquet_folder(folder).test) == 2


def test_with_an_image_size_files_are_streamed(folder: Path, write_parquet: Writer) -> None:
    write_parquet(folder / TRAIN, [*random_images(2), *random_images(1, channels=1, height=9)], [2, 0, 1])
    dataset = load_parquet_folder(folder, image_size=8, on_corrupt="skip", crop_area=(0.5, 1.0))
    assert isinstance(dataset.train, StreamSplit)
    assert (dataset.name, len(dataset.train), len(dataset.test)) == ("pets", 3, 3)
    assert (dataset.in_channels, *dataset.image_size) == (3, 8, 8)
    assert dataset.class_names == CLASS_NAMES
    assert dataset.train.labels.tolist() == [2, 0, 1]
    assert dataset.train.crop == RandomResizedCrop((0.5, 1.0))
    assert dataset.test.crop == CenterCrop()
    assert dataset.test.on_corrupt == "skip"
    write_parquet(folder / TEST, random_images(1), [3], class_names=None)
    with pytest.raises(DataError, match="other class names"):
        load_parquet_folder(folder, image_size=8)


def test_rejects_bad_options(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"`image_size` \(=0\) must be positive"):
        load_parquet_folder(folder, image_size=0)
    with pytest.raises(ValueError, match=r"`on_corrupt` \(='no'\) must be one of stop, skip"):
        load_parquet_folder(folder, on_corrupt="no")
    with pytest.raises(ValueError, match="`crop_area`"):
        load_parquet_folder(folder, image_size=8, crop_area=(0.0, 1.0))


# ---- bad folders


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    with pytest.raises(DataError, match=rf"must be a folder, not a file; pass '{folder}'"):
        load_parquet_folder(folder / TRAIN)


@pytest.mark.parametrize(
    ("removed", "missing"),
    [
        ([TRAIN], "it lacks `train-*.parquet`"),
        ([TEST], "it lacks `test-*.parquet`"),
        ([TRAIN, TEST], "it lacks `train-*.parquet` and `test-*.parquet`"),
    ],
)
def test_missing_split(folder: Path, removed: list[str], missing: str) -> None:
    for name in removed:
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"must hold `train-\*\.parquet` and `test-\*\.parquet`") as caught:
        load_parquet_folder(folder)
    assert missing in str(caught.value)


def test_splits_in_two_folders(folder: Path) -> None:
    (folder / "train").mkdir()
    (folder / TRAIN).rename(folder / "train" / TRAIN)
    with pytest.raises(DataError, match=r"together in one inner folder; put them together"):
        load_parquet_folder(folder)


def test_several_data_sets_in_one_folder(folder: Path) -> None:
    (folder / "copy").mkdir()
    for file in folder.glob("*.parquet"):
        (folder / "copy" / file.name).symlink_to(file)
    assert load_parquet_folder(folder).name == "pets"  # the folder itself comes first
    (folder.parent / "copy").symlink_to(folder)
    with pytest.raises(DataError, match=r"holds several data sets \(copy, pets\); pass the folder of one of them"):
        load_parquet_folder(folder.parent)


def test_missing_shard(folder: Path) -> None:
    (folder / TRAIN).rename(folder / "train-00000-of-00002.parquet")
    with pytest.raises(DataError, match=r"holds 1 `train-\*\.parquet`, but their names mention 2; complete"):
        load_parquet_folder(folder)


def test_two_sets_of_shards(folder: Path) -> None:
    (folder / "train-00000-of-00002.parquet").symlink_to(folder / TRAIN)
    with pytest.raises(DataError, match="mention 1 and 2; complete the download, and keep one set"):
        load_parquet_folder(folder)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~unknown_user/data", "does not exist; pass a folder of images"),
        ("x" * 5000, "cannot be opened: .*; pass a folder that can be read"),
    ],
    ids=["user", "length"],
)
def test_unreadable_paths(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_parquet_folder(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_folder_without_permission(folder: Path) -> None:
    folder.chmod(0)
    try:
        with pytest.raises(DataError, match=r"cannot be opened: .*Permission denied"):
            load_parquet_folder(folder)
    finally:
        folder.chmod(0o700)


# ---- bad files


@pytest.mark.parametrize("name", [TRAIN, TEST])
@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "dangling link", "folder"])
def test_file_that_is_not_parquet(
    folder: Path, name: str, damage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("datasets")
    monkeypatch.setattr(logger, "propagate", True)  # so that `caplog` sees its messages
    logger.setLevel(logging.WARNING)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "dangling link":
        (folder / name).symlink_to(folder / "nowhere")
    elif damage == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes({"empty": b"", "text": b"label\n1\n", "truncated": content[:-20]}[damage])
    with pytest.raises(DataError, match=rf"'{folder / name}' cannot be read as parquet: [^\n]+; download it again\.$"):
        load_parquet_folder(folder)
    assert caplog.records == []  # no messages of the reader itself
    assert logger.level == logging.WARNING


def test_damaged_pages(folder: Path) -> None:
    content = bytearray((folder / TRAIN).read_bytes())
    content[4:200] = bytes(196)
    (folder / TRAIN).write_bytes(content)
    with pytest.raises(DataError, match=TRAIN):
        load_parquet_folder(folder)


@pytest.mark.parametrize(
    "columns", [{"image_column": "photo"}, {"label_column": "class"}, {"image_column": "x", "label_column": "y"}]
)
def test_wrong_columns(folder: Path, write_parquet: Writer, columns: dict[str, str]) -> None:
    write_parquet(folder / TEST, random_images(1), [0], **columns)
    image, label = columns.get("image_column", "img"), columns.get("label_column", "label")
    message = rf"{TEST}' has the columns {image}, {label}; it must have one of img, image and one of label, fine_label"
    with pytest.raises(DataError, match=message):
        load_parquet_folder(folder)


def test_a_column_without_images(folder: Path) -> None:
    datasets.Dataset.from_dict({"img": [1, 2], "label": [0, 1]}).to_parquet(folder / TEST)
    with pytest.raises(
        DataError, match=rf"the images of '{folder / TEST}' must be stored as encoded bytes, not as int64"
    ):
        load_parquet_folder(folder)


def test_images_as_plain_bytes(folder: Path) -> None:
    images = [encode(image) for image in random_images(2)]
    for name in (TRAIN, TEST):
        datasets.Dataset.from_dict({"image": images, "label": [1, 0]}).to_parquet(folder / name)
    assert torch.equal(load_parquet_folder(folder).train.images, random_images(2))


@pytest.mark.parametrize(("labels", "label_type"), [([0.0, 1.0], "float32"), (["a", "b"], "string")])
def test_labels_that_are_not_integers(
    folder: Path, write_parquet: Writer, labels: list[object], label_type: str
) -> None:
    write_parquet(folder / TEST, random_images(2), labels, class_names=None, label_type=label_type)
    with pytest.raises(DataError, match=rf"the labels of '.*{TEST}' must be integers, not Value\('{label_type}'\)"):
        load_parquet_folder(folder)


@pytest.mark.parametrize(("label", "label_type"), [(3, "int64"), (-1, "int64"), (2**63 - 1, "int64"), (None, "int64")])
def test_labels_without_a_class(tmp_path: Path, write_parquet: Writer, label: int | None, label_type: str) -> None:
    options = {"class_names": None, "label_type": label_type}
    write_parquet(tmp_path / TRAIN, random_images(3), [0, 1, 2], **options)
    write_parquet(tmp_path / TEST, random_images(3), [0, label, 2], **options)
    message = rf"row 1 of '.*{TEST}' has the label {label}, but there are 3 classes, so it must be in 0\.\.2"
    with pytest.raises(DataError, match=message):
        load_parquet_folder(tmp_path)


def test_rejects_gaps_between_numbered_classes(tmp_path: Path, write_parquet: Writer) -> None:
    write_parquet(tmp_path / TRAIN, random_images(2), [0, 10**9], class_names=None)
    write_parquet(tmp_path / TEST, random_images(1), [0], class_names=None)
    with pytest.raises(DataError, match=r"row 1 of .* has the label 1000000000, but there are 2 classes"):
        load_parquet_folder(tmp_path)


def test_missing_label_of_a_named_class(folder: Path, write_parquet: Writer) -> None:
    write_parquet(folder / TEST, random_images(2), [0, -1])  # the label -1 marks an unlabeled test set on the hub
    with pytest.raises(DataError, match=rf"row 1 of '.*{TEST}' has the label -1"):
        load_parquet_folder(folder)


def test_other_class_names_in_the_test_file(folder: Path, write_parquet: Writer) -> None:
    write_parquet(folder / TEST, random_images(2), [0, 1], class_names=["dog", "cat", "frog"])
    with pytest.raises(DataError, match=rf"'.*{TEST}' has other class names in its metadata than '.*{TRAIN}'"):
        load_parquet_folder(folder)


def test_file_without_rows(folder: Path, write_parquet: Writer) -> None:
    write_parquet(folder / TEST, [], [])
    with pytest.raises(DataError, match=rf"'.*{TEST}' holds no images"):
        load_parquet_folder(folder)


# ---- bad images


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, " cannot be decoded: it is empty; restore it, or set `on_corrupt` to 'skip'"),
        ({"bytes": None, "path": "/etc/hostname"}, ", which has a path instead of an image, cannot be decoded: it is"),
        ({"bytes": b"", "path": None}, " cannot be decoded: it is empty"),
        ({"bytes": b"not an image", "path": None}, " cannot be decoded: it is not an image"),
        ({"bytes": encode(random_images(1)[0])[:60], "path": None}, " cannot be decoded: "),
        (
            random_images(1, channels=1)[0],
            r" holds an image of shape \(1, 5, 4\) .* row 0 .* one of \(3, 5, 4\); pass `image_size` to resize them",
        ),
        (random_images(1, height=6)[0], r" holds an image of shape \(3, 6, 4\) \(channels, height, width\)"),
    ],
    ids=["null", "path", "empty", "text", "truncated", "gray among color", "size"],
)
def test_bad_images(folder: Path, write_parquet: Writer, image: object, message: str) -> None:
    write_parquet(folder / TEST, [*random_images(2), image], [0, 1, 2])
    with pytest.raises(DataError, match=rf"^row 2 of '{folder / TEST}'{message}"):
        load_parquet_folder(folder)


def test_undecodable_images_are_skipped(folder: Path, write_parquet: Writer, caplog: pytest.LogCaptureFixture) -> None:
    images = random_images(2)
    write_parquet(folder / TRAIN, [{"bytes": b"", "path": None}, images[0], None, images[1]], [0, 1, 2, 0])
    dataset = load_parquet_folder(folder, on_corrupt="skip")
    assert torch.equal(dataset.train.images, images)
    assert dataset.train.labels.tolist() == [1, 0]
    assert caplog.messages == [
        f"skipped row 0 of '{folder / TRAIN}': it is empty",
        f"skipped row 2 of '{folder / TRAIN}': it is empty",
    ]
    write_parquet(folder / TRAIN, [None, None], [0, 1])
    with pytest.raises(DataError, match=rf"no image of '{folder / TRAIN}' can be decoded; download the file again"):
        load_parquet_folder(folder, on_corrupt="skip")


def test_transparent_images_are_put_on_white(folder: Path, write_parquet: Writer) -> None:
    image = random_images(1, channels=4)[0]
    image[3, 0] = 0
    image[3, 1:] = 255
    write_parquet(folder / TEST, image[None], [0])
    loaded = load_parquet_folder(folder).test.images[0]
    assert torch.equal(loaded[:, 1:], image[:3, 1:])
    assert loaded[:, 0].eq(255).all()


@pytest.mark.parametrize("shape", [{"channels": 1}, {"width": 5}])
def test_files_with_images_of_different_shapes(folder: Path, write_parquet: Writer, shape: dict[str, int]) -> None:
    write_parquet(folder / TEST, random_images(2, **shape), [0, 1])
    with pytest.raises(DataError, match=rf"'.*{TEST}' holds images of shape .*'.*{TRAIN}' of \(3, 5, 4\); pass"):
        load_parquet_folder(folder)


# ---- missing packages


@pytest.mark.parametrize(("module", "package"), [("datasets", "Hugging Face `datasets`"), ("PIL.Image", "Pillow")])
def test_missing_package(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"needs {package}, .*`pip install .*\[(train|cli)\]'`"):
        load_parquet_folder(folder)
