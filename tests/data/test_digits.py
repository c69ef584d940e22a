import hashlib
import sys

import pytest
import sklearn.datasets
import torch

from revnet.data import ImageDataset, load_dataset
from revnet.data.digits import load_digits
from revnet.errors import MissingDependencyError


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset("digits")


def test_shapes_and_names(digits: ImageDataset) -> None:
    assert digits.name == "digits"
    assert digits.train.images.shape == (1437, 1, 8, 8)
    assert digits.test.images.shape == (360, 1, 8, 8)
    assert digits.class_names == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


def test_split_never_drifts(digits: ImageDataset) -> None:
    # Accuracies are comparable only while these hold. If a new scikit-learn breaks them, mend the loader.
    digests = [
        hashlib.sha256(split.images.numpy().tobytes() + split.labels.numpy().tobytes()).hexdigest()
        for split in (digits.train, digits.test)
    ]
    assert digests == [
        "cf523fcf146ab6c4a2fc65ac83b5a8f7bbca3d816b439954e27c285d3462cf27",
        "99ac20baf448e93ec299f54c03a2c33ee412f212ef1a8cfed87dcecc7d550da9",
    ]


def test_split_keeps_every_image_once(digits: ImageDataset) -> None:
    source = torch.from_numpy(sklearn.datasets.load_digits().images).flatten(1)
    ours = torch.cat([digits.train.images, digits.test.images]).flatten(1) / 255 * 16
    assert torch.equal(ours.round().unique(dim=0), source.float().unique(dim=0))
    assert len(ours) == len(source)


def test_split_is_stratified(digits: ImageDataset) -> None:
    counts = digits.train.labels.bincount() + digits.test.labels.bincount()
    torch.testing.assert_close(digits.test.labels.bincount(), counts * 0.2, atol=1, rtol=0, check_dtype=False)


def test_grey_levels_span_the_byte(digits: ImageDataset) -> None:
    levels = digits.train.images.unique()
    assert levels.tolist() == [round(level * 255 / 16) for level in range(17)]


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    message = r"the data set `digits` needs scikit-learn, which is not installed; run `pip install .*\[train\]'`\."
    with pytest.raises(MissingDependencyError, match=message):
        load_digits()
