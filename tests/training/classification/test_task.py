from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revnet.data import Preprocess
from revnet.data.transforms._color_distortion import make_color_distortion
from revnet.data.transforms.augment import NoAugment
from revnet.training import Classifier, TrainConfig
from revnet.training.classification.model import ClassifierHeader
from revnet.training.classification.task import ClassificationTask


class Brighten(nn.Module):
    def forward(self, images, keys=None):
        self.keys = keys
        return images + 1 if self.training else images


@pytest.fixture
def task():
    header = ClassifierHeader(
        model="revnet38",
        data="digits",
        class_names=tuple("0123456789"),
        image_shape=(1, 8, 8),
        preprocess="standardize",
    )
    preprocess = Preprocess(torch.full((1, 1, 1), 8.0), torch.full((1, 1, 1), 2.0))
    return ClassificationTask(
        Classifier.create(header, preprocess), NoAugment(), Brighten(), TrainConfig(), num_updates=8
    )


def test_augments_images_in_training_only(task):
    batch = torch.full((2, 1, 8, 8), 10, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    images, labels = task.train().on_after_batch_transfer(batch, 0)
    assert torch.equal(images, torch.full((2, 1, 8, 8), 2.0))
    assert torch.equal(labels, batch[1])
    images, _ = task.eval().on_after_batch_transfer(batch, 0)
    assert torch.equal(images, torch.full((2, 1, 8, 8), 1.0))


def test_transforms_get_the_keys_of_the_batch(task):
    keys = torch.tensor([3, 4])
    batch = torch.full((2, 1, 8, 8), 10, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), keys
    images, labels = task.train().on_after_batch_transfer(batch, 0)
    assert (len(images), len(labels)) == (2, 2)
    assert task.augment.keys is keys
    task.classifier.preprocess = nn.Identity()
    task.distort, task.augment = make_color_distortion(), NoAugment()
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    images, _ = task.train().on_after_batch_transfer((pixels, batch[1], keys), 0)
    assert torch.equal(images, make_color_distortion()(pixels, keys))


def test_training_images_grow(task):
    task.config = TrainConfig(start_size=4, full_size_at=0.5)
    task.trainer = SimpleNamespace(global_step=0)
    batch = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    sizes = []
    for task.trainer.global_step in (0, 3, 4, 7):
        sizes.append(tuple(task.train().on_after_batch_transfer(batch, 0)[0].shape[2:]))
    assert sizes == [(4, 4), (4, 4), (8, 8), (8, 8)]
    task.trainer.global_step = 0
    assert task.eval().on_after_batch_transfer(batch, 0)[0].shape[2:] == (8, 8)


def test_smooths_labels_in_the_training_loss(task, monkeypatch):
    task.config = TrainConfig(label_smoothing=0.2)
    monkeypatch.setattr(task, "log", lambda *args, **kwargs: None)
    batch = torch.randn(4, 1, 8, 8), torch.arange(4)
    loss = task.eval().training_step(batch, 0)
    logits = task.classifier.model(batch[0])
    uniform = -logits.log_softmax(1).mean(1)
    expected = 0.8 * F.cross_entropy(logits, batch[1], reduction="none") + 0.2 * uniform
    torch.testing.assert_close(loss, expected.mean())


def test_settings_reach_the_optimizer(task):
    task.config = TrainConfig(schedule="cosine", warmup=0.5, nesterov=True, lr=0.3)
    configured = task.configure_optimizers()
    group = configured["optimizer"].param_groups[0]
    assert group["nesterov"]
    assert (group["initial_lr"], group["lr"]) == (0.3, pytest.approx(0.3 / 5)), "the first of 8 updates"
    assert configured["lr_scheduler"]["interval"] == "step"


def test_optimizer_of_the_paper(task):
    optimizer = task.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(group["lr"], group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {
        (0.1, 0.9, False)
    }
    assert [group["weight_decay"] for group in optimizer.param_groups] == [2e-4, 0]


def test_momentum_is_the_first_beta_of_adamw(task):
    task.config = TrainConfig(optimizer="adamw", lr=2e-3, momentum=0.8, weight_decay=0.05)
    optimizer = task.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(group["lr"], group["betas"]) for group in optimizer.param_groups} == {(2e-3, (0.8, 0.999))}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0]


def test_checkpoint_has_a_header(task):
    checkpoint = {}
    task.on_save_checkpoint(checkpoint)
    assert checkpoint["revnet"]["model"] == "revnet38"
