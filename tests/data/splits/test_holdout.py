import hashlib

import numpy as np
import pytest
import torch

from revnet.data import ImageDataset
from revnet.data.splits._holdout import stratified_parts
from revnet.data.splits.image_split import ImageSplit


def make_dataset(num_images: int = 100, num_classes: int = 3) -> ImageDataset:
    """Return images whose pixels equal their indices."""
    images = torch.arange(num_images, dtype=torch.uint8).view(-1, 1, 1, 1)
    split = ImageSplit(images, torch.arange(num_images) % num_classes)
    return ImageDataset("toy", split, split, tuple(str(number) for number in range(num_classes)))


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
def test_holdout_rejects_fractions_outside_the_unit_interval(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"`fraction` \(=.*\) must be between 0 and 1, both excluded; pass 0\.1"):
        make_dataset().holdout(fraction, seed=0)


@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        (0.02, r"\(=0.02\) holds out 2 images of 100, fewer than the 3 classes; pass 0.03, or leave out the holdout"),
        (0.99, r"\(=0.99\) leaves 1 image of 100, fewer than the 3 classes; pass 0.03, or leave out the holdout"),
    ],
)
def test_holdout_rejects_impossible_splits(fraction: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^`fraction` {message}"):
        make_dataset(100).holdout(fraction, 0)
    make_dataset(100).holdout(0.03, 0)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_holdout_rejects_seeds_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"`seed` \(={seed}\) must be from 0 to 2\^32 - 1"):
        make_dataset(100).holdout(0.2, seed)


def test_holdout_rejects_a_class_with_one_image() -> None:
    split = ImageSplit(torch.zeros(9, 1, 1, 1, dtype=torch.uint8), torch.tensor([0] * 8 + [1]))
    with pytest.raises(ValueError, match="the class 'b' has a single training image; add images"):
        ImageDataset("toy", split, split, ("a", "b")).holdout(0.5, seed=0)


def random_labels(num_images: int, num_classes: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(num_images).randint(num_classes, size=num_images))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.37, 0.5, 0.9])
@pytest.mark.parametrize(("num_images", "num_classes"), [(50, 2), (97, 3), (500, 7), (1437, 10)])
def test_holdout_equals_scikit_learn(num_images: int, num_classes: int, fraction: float, seed: int) -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    labels = random_labels(num_images, num_classes)
    parts = selection.train_test_split(
        np.arange(num_images), test_size=fraction, random_state=seed, stratify=labels.numpy()
    )
    assert stratified_parts(labels, fraction, seed) == tuple(sorted(part.tolist()) for part in parts)


def test_holdout_never_changes() -> None:
    # Accuracies on the validation part are comparable only while a seed gives the same split.
    parts = [
        stratified_parts(random_labels(num_images, 5), fraction, seed)
        for num_images in (60, 333)
        for fraction in (0.1, 0.3)
        for seed in (0, 1)
    ]
    assert hashlib.sha256(repr(parts).encode()).hexdigest() == (
        "a65170b887c5fd225d84bf17af3231acf14ae639da9f394790d80f6734a820bb"
    )
