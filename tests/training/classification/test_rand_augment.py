import sys

import pytest
import torch

from revnet.errors import MissingDependencyError
from revnet.training import TrainConfig, train
from revnet.training.classification.rand_augment import RandAugment, make_distortion


def test_changes_training_images_only():
    pytest.importorskip("kornia")
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    augment = RandAugment(9)
    changed = augment.train()(images)
    assert (changed.shape, changed.dtype) == (images.shape, torch.uint8)
    assert not torch.equal(changed, images)
    assert augment.eval()(images) is images


def test_the_seed_decides():
    pytest.importorskip("kornia")
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(RandAugment(9).train()(images))
    assert torch.equal(*results)


def test_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    monkeypatch.setitem(sys.modules, "kornia.augmentation.auto", None)
    with pytest.raises(MissingDependencyError, match=r"`randaugment` needs kornia, which is not installed; run `pip"):
        make_distortion(TrainConfig(randaugment=9), 3)


def test_rejects_gray_images(out_dir):
    with pytest.raises(ValueError, match=r"`randaugment` \(=9\) is for RGB images, and the data have 1 channel; leave"):
        train(TrainConfig(randaugment=9, out_dir=out_dir), quiet=True)


def test_both_kinds_of_distortion_run(monkeypatch):
    pytest.importorskip("kornia")
    distort = make_distortion(TrainConfig(randaugment=9, color_distortion=True), 3).train()
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    assert distort(images).shape == images.shape
