import sys

import pytest
import torch

from revnet.data import ImageDataset, ImageSplit
from revnet.errors import MissingDependencyError


def make_split(num_images: int = 12, num_classes: int = 3, size: tuple[int, int] = (2, 2)) -> ImageSplit:
    """Every image carries its own index as pixel value."""
    images = torch.arange(num_images, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, *size).contiguous()
    return ImageSplit(images, torch.arange(num_images) % num_classes)


def make_dataset(num_images: int = 100, num_classes: int = 3) -> ImageDataset:
    names = tuple(str(i) for i in range(num_classes))
    return ImageDataset("toy", make_split(num_images, num_classes), make_split(num_classes, num_classes), names)


def test_split_is_a_dataset_of_pairs() -> None:
    split = make_split()
    image, label = split[4]
    assert len(split) == 12
    assert torch.equal(image, split.images[4])
    assert label == 1
    assert [int(label) for _, label in split] == [0, 1, 2] * 4


def test_split_prints_its_shape_and_not_its_pixels() -> None:
    assert repr(make_split()) == "ImageSplit(images=uint8 of shape (12, 1, 2, 2))"


def test_split_gives_a_whole_batch_at_once() -> None:
    images, labels = make_split().__getitems__([5, 0, 5])
    assert images[:, 0, 0, 0].tolist() == [5, 0, 5]
    assert labels.tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), r"`images` \(=float32 of shape \(3, 1, 2, 2\)\)"),
        (torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"\(N, C, H, W\)"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3), r"`labels` \(=float32 of shape \(3,\)\)"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), r"int64 of shape \(3,\)"),
        (torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "must not be empty"),
    ],
)
def test_split_rejects_bad_tensors(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSplit(images, labels)


def test_dataset_properties() -> None:
    dataset = ImageDataset("toy", make_split(size=(2, 3)), make_split(size=(2, 3)), ("a", "b", "c", "unseen"))
    assert dataset.num_classes == 4
    assert dataset.in_channels == 1
    assert dataset.image_size == (2, 3)


def test_dataset_rejects_splits_of_different_sizes() -> None:
    with pytest.raises(ValueError, match=r"`test` .* must hold images of the same shape as `train`"):
        ImageDataset("toy", make_split(size=(2, 2)), make_split(size=(3, 2)), ("a", "b", "c"))


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("label", [-1, 3])
def test_dataset_rejects_labels_without_a_name(part: str, label: int) -> None:
    good = make_split()
    bad = ImageSplit(good.images, torch.where(good.labels == 2, label, good.labels))
    splits = {"train": good, "test": good, part: bad}
    with pytest.raises(ValueError, match=rf"`{part}` .* must have labels in 0\.\.2"):
        ImageDataset("toy", **splits, class_names=("a", "b", "c"))


def test_holdout_parts_are_disjoint_and_complete() -> None:
    dataset = make_dataset(100)
    train, validation = dataset.holdout(0.25, seed=0)
    train_ids, validation_ids = train.images[:, 0, 0, 0].tolist(), validation.images[:, 0, 0, 0].tolist()
    assert len(validation) == 25
    assert sorted(train_ids + validation_ids) == list(range(100))
    assert train_ids == sorted(train_ids)
    assert validation_ids == sorted(validation_ids)
    assert train.labels.tolist() == [i % 3 for i in train_ids]


def test_holdout_is_stratified() -> None:
    images = torch.zeros(100, 1, 1, 1, dtype=torch.uint8)
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    split = ImageSplit(images, labels)
    _, validation = ImageDataset("toy", split, split, ("a", "b", "c")).holdout(0.1, seed=3)
    assert validation.labels.bincount().tolist() == [7, 2, 1]


def test_holdout_depends_on_the_seed_alone() -> None:
    dataset = make_dataset(100)
    torch.manual_seed(1)
    first = dataset.holdout(0.2, seed=5)[1]
    torch.manual_seed(2)
    assert torch.equal(first.images, dataset.holdout(0.2, seed=5)[1].images)
    assert not torch.equal(first.images, dataset.holdout(0.2, seed=6)[1].images)


@pytest.mark.parametrize("fraction", [0, 1, 0.0, 1.0, 2, -0.1, float("nan"), float("inf")])
def test_holdout_rejects_fractions_outside_of_the_unit_interval(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"`fraction` \(=.*\) must lie between 0 and 1, both excluded; pass 0\.1"):
        make_dataset().holdout(fraction, seed=0)


@pytest.mark.parametrize(
    ("fraction", "seed"), [(0.02, 0), (0.99, 0), (0.2, -1), (0.2, 2**32)], ids=["few", "many", "negative", "huge"]
)
def test_holdout_rejects_what_cannot_be_split(fraction: float, seed: int) -> None:
    with pytest.raises(
        ValueError, match=r"^`fraction` .* `seed` .* do not split 100 images of 3 classes: .*; pass another"
    ):
        make_dataset(100).holdout(fraction, seed)


def test_holdout_rejects_a_class_with_one_image() -> None:
    split = ImageSplit(torch.zeros(9, 1, 1, 1, dtype=torch.uint8), torch.tensor([0] * 8 + [1]))
    with pytest.raises(ValueError, match="do not split 9 images of 2 classes"):
        ImageDataset("toy", split, split, ("a", "b")).holdout(0.5, seed=0)


def test_holdout_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(MissingDependencyError, match=r"needs scikit-learn, .*`pip install .*\[train\]'`"):
        make_dataset().holdout(0.2, seed=0)
