import hashlib
from importlib.resources import files

import pytest
import torch

from revnet.data import ImageDataset, load_dataset


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset("digits")


def test_shapes_and_names(digits: ImageDataset) -> None:
    assert digits.name == "digits"
    assert digits.train.images.shape == (1437, 1, 8, 8)
    assert digits.test.images.shape == (360, 1, 8, 8)
    assert digits.class_names == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


def test_data_never_change(digits: ImageDataset) -> None:
    # Accuracies are comparable only while these digests hold.
    digests = [
        hashlib.sha256(split.images.numpy().tobytes() + split.labels.numpy().tobytes()).hexdigest()
        for split in (digits.train, digits.test)
    ]
    assert digests == [
        "cf523fcf146ab6c4a2fc65ac83b5a8f7bbca3d816b439954e27c285d3462cf27",
        "99ac20baf448e93ec299f54c03a2c33ee412f212ef1a8cfed87dcecc7d550da9",
    ]


def test_data_equal_scikit_learn(digits: ImageDataset) -> None:
    source = pytest.importorskip("sklearn.datasets").load_digits()
    selection = pytest.importorskip("sklearn.model_selection")
    images = torch.from_numpy(source.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    parts = selection.train_test_split(range(1797), test_size=360, random_state=0, stratify=source.target)
    for split, indices in zip((digits.train, digits.test), map(sorted, parts), strict=True):
        assert torch.equal(split.images, images[indices])
        assert torch.equal(split.labels, torch.from_numpy(source.target)[indices])


def test_split_is_stratified(digits: ImageDataset) -> None:
    counts = digits.train.labels.bincount() + digits.test.labels.bincount()
    torch.testing.assert_close(digits.test.labels.bincount(), counts * 0.2, atol=1, rtol=0, check_dtype=False)


def test_gray_levels_span_the_byte(digits: ImageDataset) -> None:
    levels = digits.train.images.unique()
    assert levels.tolist() == [round(level * 255 / 16) for level in range(17)]


def test_source_and_license_are_in_the_package() -> None:
    text = files("revnet.data.sources").joinpath("digits_license.txt").read_text()
    assert "UCI Machine Learning Repository" in text
    assert "Redistribution and use in source and binary forms" in text
