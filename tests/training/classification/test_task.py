from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revnet.data import Preprocess
from revnet.models import create_model, list_models
from revnet.models.reversible_vit import PositionEmbedding
from revnet.training import Classifier, TrainConfig
from revnet.training.classification.model import ClassifierHeader
from revnet.training.classification.task import ClassificationTask
from revnet.training.optimizers import parameter_groups


@pytest.mark.parametrize("name", list_models())
def test_only_convolution_and_linear_weights_decay(name):
    with torch.device("meta"):
        model = create_model(name)
    decayed, others = parameter_groups(model, 2e-4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 2e-4
    assert others["weight_decay"] == 0
    assert all(parameter.ndim in (2, 4) for parameter in decayed["params"])
    positions = {name for name, module in model.named_modules() if isinstance(module, PositionEmbedding)}
    for parameter in others["params"]:
        assert parameter.ndim == 1 or names[id(parameter)].removesuffix(".weight") in positions
    found = [names[id(parameter)] for group in (decayed, others) for parameter in group["params"]]
    assert sorted(found) == sorted(names.values())


def test_a_shared_weight_is_in_one_group_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    decayed, others = parameter_groups(model, 0.1)
    assert [len(decayed["params"]), len(others["params"])] == [1, 2]


class Brighten(nn.Module):
    def forward(self, images):
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
        Classifier.create(header, preprocess), nn.Identity(), Brighten(), TrainConfig(), num_updates=8
    )


def test_images_are_preprocessed_always_and_augmented_in_training_only(task):
    batch = torch.full((2, 1, 8, 8), 10, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    images, labels = task.train().on_after_batch_transfer(batch, 0)
    assert torch.equal(images, torch.full((2, 1, 8, 8), 2.0))
    assert torch.equal(labels, batch[1])
    images, _ = task.eval().on_after_batch_transfer(batch, 0)
    assert torch.equal(images, torch.full((2, 1, 8, 8), 1.0))


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


def test_labels_are_smoothed_in_training_only(task, monkeypatch):
    task.config = TrainConfig(label_smoothing=0.2)
    monkeypatch.setattr(task, "log", lambda *args, **kwargs: None)
    batch = torch.randn(4, 1, 8, 8), torch.arange(4)
    loss = task.eval().training_step(batch, 0)
    logits = task.classifier.model(batch[0])
    uniform = -logits.log_softmax(1).mean(1)
    expected = 0.8 * F.cross_entropy(logits, batch[1], reduction="none") + 0.2 * uniform
    torch.testing.assert_close(loss, expected.mean())


def test_the_settings_reach_the_optimizer(task):
    task.config = TrainConfig(schedule="cosine", warmup=0.5, nesterov=True, lr=0.3)
    found = task.configure_optimizers()
    group = found["optimizer"].param_groups[0]
    assert group["nesterov"]
    assert (group["initial_lr"], group["lr"]) == (0.3, pytest.approx(0.3 / 5)), "the first of 8 updates"
    assert found["lr_scheduler"]["interval"] == "step"


def test_the_optimizer_is_the_papers(task):
    optimizer = task.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(group["lr"], group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {
        (0.1, 0.9, False)
    }
    assert [group["weight_decay"] for group in optimizer.param_groups] == [2e-4, 0]


def test_adamw_has_the_momentum_as_its_first_beta(task):
    task.config = TrainConfig(optimizer="adamw", lr=2e-3, momentum=0.8, weight_decay=0.05)
    optimizer = task.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(group["lr"], group["betas"]) for group in optimizer.param_groups} == {(2e-3, (0.8, 0.999))}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0]


def test_a_checkpoint_says_what_it_is_of(task):
    checkpoint = {}
    task.on_save_checkpoint(checkpoint)
    assert checkpoint["revnet"]["model"] == "revnet38"
