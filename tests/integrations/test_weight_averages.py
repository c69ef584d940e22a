"""Averages of weights: `torch.optim.swa_utils`, and the callbacks of Lightning."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader

from revnet import Store, set_policy
from revnet.models import RevNet
from tests.helpers import assert_close

BATCHES = [(torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(3, (4,))) for _ in range(6)]


def make_model():
    torch.manual_seed(0)
    return RevNet(num_blocks=(2, 2), widths=(4, 6, 8), num_classes=3).double()


def stored(model):
    twin = copy.deepcopy(model)
    set_policy(twin, Store())
    return twin


def step(model, optimizer, batch):
    images, labels = batch
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def test_averaged_model_and_update_bn():
    outputs = []
    for model in (make_model(), stored(make_model())):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in BATCHES:
            step(model, optimizer, batch)
            average.update_parameters(model)
        update_bn(BATCHES, average)
        outputs.append(average.eval()(BATCHES[0][0]))
    assert_close(*outputs)


def test_update_bn_weighs_all_batches_equally():
    """The biased batch norm averages the biased variances of the batches."""
    model = make_model()
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    inputs = []
    norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    for _ in range(2):  # The second call discards the statistics of the first.
        inputs.clear()
        update_bn(BATCHES, model)
    variances = [x.var((0, 2, 3), correction=0) for x in inputs]
    means = [x.mean((0, 2, 3)) for x in inputs]
    assert len(means) == len(BATCHES)
    assert_close(norm.running_mean, torch.stack(means).mean(0))
    assert_close(norm.running_var, torch.stack(variances).mean(0))
    assert norm.momentum == 0.01, "update_bn restores the momentum"


class Module(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch):
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")  # Lightning's own: number of workers, and its scheduler.
@pytest.mark.parametrize(
    "make", [lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1), EMAWeightAveraging]
)
def test_callbacks_of_lightning(make, tmp_path):
    results = []
    for model in (make_model(), stored(make_model())):
        trainer = Trainer(
            max_epochs=3,
            accelerator="cpu",
            callbacks=[make()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(Module(model), DataLoader(BATCHES, batch_size=None))
        results.append(model.state_dict())
    assert_close(*results)
    assert not torch.equal(results[0]["head.weight"], make_model().state_dict()["head.weight"])
