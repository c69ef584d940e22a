"""`MemoryBudget` plans any LightningModule: the peak is right, and nothing else of the run changes."""

import importlib
import random
import sys
from collections import deque

import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from revnet import (
    BudgetError,
    CheckpointError,
    MissingDependencyError,
    PredictionError,
    Reverse,
    ReversibleBlock,
    ReversibleSequential,
    Store,
    set_policy,
)
from revnet.lightning import MemoryBudget
from revnet.memory.step._live import LiveBytes
from revnet.training import DriftMonitor
from revnet.training.run.trainer import quiet

WIDTH, DEPTH = 16, 3


def mlp():
    return nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1)
    )


class Module(lightning.LightningModule):
    """A module as a user writes it, which logs nothing."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 2 * WIDTH), nn.BatchNorm1d(2 * WIDTH))
        blocks = [ReversibleBlock(mlp(), mlp(), split_dim=-1) for _ in range(DEPTH)]
        self.net = ReversibleSequential(*blocks)
        self.head = nn.Linear(2 * WIDTH, 5)

    def training_step(self, batch, batch_idx):
        logits = self.head(self.net(self.stem(batch[0])))
        return nn.functional.cross_entropy(logits, batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


class WithoutDropout(Module):
    """A module that draws no random numbers, whose state Lightning does not save."""

    def __init__(self):
        super().__init__()
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


class Logging(Module):
    """A module that logs, with a metric, and returns a dict."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(5)

    def training_step(self, batch):
        logits = self.head(self.net(self.stem(batch[0])))
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.log("loss", loss, on_epoch=True)
        self.log_dict({"accuracy": self.accuracy(logits, batch[1])})
        self.num_calls = getattr(self, "num_calls", 0) + 1
        return {"loss": loss}


class Mixing(WithoutDropout):
    """A module that mixes images by numbers of Python and NumPy, and collects losses in containers of containers."""

    def __init__(self):
        super().__init__()
        self.losses = {"train": [], "recent": deque(maxlen=3)}

    def training_step(self, batch, batch_idx):
        x = batch[0] * random.random() + batch[0].flip(0) * np.random.beta(1, 1)
        loss = super().training_step([x, batch[1]], batch_idx)
        for losses in self.losses.values():
            losses.append(loss.detach())
        return loss


def fit(module, *callbacks, num_epochs=1, ckpt_path=None, folder=None, **options):
    torch.manual_seed(5)
    data = TensorDataset(torch.randn(128, 8), torch.randint(5, (128,)))
    with quiet():
        trainer = lightning.Trainer(
            max_epochs=num_epochs,
            callbacks=list(callbacks),
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=folder is not None,
            default_root_dir=folder,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(module, DataLoader(data, batch_size=32), ckpt_path=ckpt_path)
    return trainer


def make(kind=Module, **options):
    torch.manual_seed(0)
    return kind(**options)


class Watch(lightning.Callback):
    """Count the live bytes of each batch: the model, the optimizer's state, and everything that is allocated."""

    def __init__(self):
        self.peaks = []
        self._mode = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        state = [leaf for o in trainer.optimizers for leaf in tree_leaves(list(o.state.values()))]
        known = [*pl_module.parameters(), *pl_module.buffers(), *tree_leaves(batch)]
        known += [leaf for leaf in state if isinstance(leaf, torch.Tensor)]
        known += [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        self._constant = sum(tensor.nbytes for tensor in known)
        self._mode = LiveBytes(known)
        self._mode.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._mode.__exit__(None, None, None)
        self.peaks.append(self._constant + self._mode.peak_bytes)


BUDGET = "250KiB"
"""A budget between the peaks of the two uniform policies, which mixes policies."""
COPIES_OF_THE_LOSS = 3 * 8
"""Bytes that Lightning itself allocates at the peak: copies of the loss."""


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="float32", marks=pytest.mark.slow),
        pytest.param({"precision": "bf16-mixed"}, id="bf16-mixed"),
    ],
)
def test_predicted_peak_is_the_peak_of_an_update(options):
    callback, watch = MemoryBudget(BUDGET), Watch()
    fit(make(), callback, watch, **options)
    # The first update makes the state of the optimizer.
    assert 0 <= max(watch.peaks[1:]) - callback.planned_peak_bytes <= COPIES_OF_THE_LOSS
    assert callback.planned_peak_bytes == callback.plan.peak_bytes <= callback.plan.budget_bytes


@pytest.mark.slow
def test_peak_is_a_bound_with_accumulation():
    callback, watch, module = MemoryBudget("330KiB"), Watch(), make()
    fit(module, callback, watch, accumulate_grad_batches=2, num_epochs=2)
    gradient_bytes = sum(parameter.nbytes for parameter in module.parameters())
    assert callback.planned_peak_bytes == callback.plan.peak_bytes + gradient_bytes
    assert callback.planned_peak_bytes - gradient_bytes < max(watch.peaks) <= callback.planned_peak_bytes


@pytest.mark.parametrize("kind", [pytest.param(Module, marks=pytest.mark.slow), Logging])
def test_weights_are_the_ones_of_the_same_policies(kind):
    planned, callback = make(kind), MemoryBudget(BUDGET)
    fit(planned, callback, gradient_clip_val=0.1)
    assert len({type(policy) for policy in planned.net.policies}) > 1
    by_hand = make(kind)
    by_hand.net.set_policies(planned.net.policies)
    fit(by_hand, gradient_clip_val=0.1)
    for (name, p), q in zip(planned.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    if kind is Logging:
        assert planned.num_calls == by_hand.num_calls == 4
        assert planned.trainer.callback_metrics == by_hand.trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_has_the_same_plan(tmp_path):
    whole = make(WithoutDropout)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, MemoryBudget(BUDGET), saving, num_epochs=2, folder=tmp_path)
    resumed, callback = make(WithoutDropout), MemoryBudget(BUDGET)
    fit(resumed, callback, num_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)  # The plan is in plain values.
    assert callback.plan is None  # It came from the checkpoint.
    assert callback.planned_peak_bytes > 0
    assert resumed.net.policies == whole.net.policies
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    other, callback = make(WithoutDropout), MemoryBudget("1MiB")
    fit(other, callback, num_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert other.net.policies == (Store(),) * DEPTH
    callback = MemoryBudget(BUDGET)
    callback.load_state_dict({"budget_bytes": 250 * 1024, "rows": [["gone", 0, "store"]], "planned_peak_bytes": 1})
    with pytest.raises(
        CheckpointError, match="has a memory plan with the unit 0 of `gone`, which WithoutDropout lacks"
    ):
        fit(make(WithoutDropout), callback)


def test_policies_to_choose_from_and_another_module():
    callback, module = MemoryBudget(BUDGET, policies=[Reverse(), "store"]), make()
    fit(module, callback)
    assert {type(policy) for policy in module.net.policies} == {Reverse, Store}
    other = make()
    set_policy(other, "checkpoint")
    first = callback.plan
    fit(other, callback)
    assert callback.plan is not first
    assert other.net.policies == module.net.policies


def test_numbers_of_the_host_and_collected_losses_stay():
    modules = planned, by_hand = make(Mixing), make(Mixing)
    for module, callbacks in ((planned, [MemoryBudget(BUDGET)]), (by_hand, [])):
        random.seed(0)
        np.random.seed(0)
        by_hand.net.set_policies(planned.net.policies)
        fit(module, *callbacks)
    assert all(torch.equal(p, q) for p, q in zip(planned.parameters(), by_hand.parameters(), strict=True))
    for module in modules:
        assert [len(losses) for losses in module.losses.values()] == [4, 3]
        assert not any(isinstance(x, FakeTensor) for losses in module.losses.values() for x in losses)


def test_goes_with_the_drift_monitor():
    monitor, module = DriftMonitor(1), make()
    fit(module, monitor, MemoryBudget(BUDGET))
    assert list(monitor.measured) == [0, 1, 2, 3]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2 * WIDTH, 8 * WIDTH), nn.GELU(), nn.Linear(8 * WIDTH, 2 * WIDTH))

    def forward(self, x):
        return x + self.inner(x)


class Ordinary(Module):
    """A module without anything of revnet."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*[Residual() for _ in range(4)])


def test_plans_the_repeated_blocks_of_an_ordinary_module():
    stored, module = make(Ordinary), make(Ordinary)
    watch = Watch()
    fit(stored, watch)
    callback, planned = MemoryBudget(max(watch.peaks) * 9 // 10), Watch()
    fit(module, callback, planned)
    assert [unit.name for unit in callback.plan.units] == [f"module.net.{index}" for index in range(4)]
    assert 0 <= max(planned.peaks) - callback.planned_peak_bytes <= COPIES_OF_THE_LOSS
    assert callback.planned_peak_bytes <= max(watch.peaks) * 9 // 10
    assert all(map(torch.equal, module.state_dict().values(), stored.state_dict().values()))


class Small(Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 2 * WIDTH)


class Plain(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*[nn.Linear(2 * WIDTH, 2 * WIDTH) for _ in range(3)])


class Manual(Module):
    automatic_optimization = False


class ReadsTheLoss(Module):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.last = loss.item()
        return loss


class NoLoss(Module):
    def training_step(self, batch, batch_idx):
        return None


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Plain, ValueError, "has no `ModuleList` or `Sequential` with several blocks of one class"),
        (Manual, NotImplementedError, "Manual, which optimizes manually"),
        (ReadsTheLoss, PredictionError, "the forward pass of ReadsTheLoss .* value of a tensor .*take that out of"),
        (NoLoss, PredictionError, "`training_step` of NoLoss returned NoneType"),
    ],
)
def test_refuses_what_it_cannot_count(kind, error, message):
    with pytest.raises(error, match=message) as caught:
        fit(make(kind), MemoryBudget("1MiB"))
    assert "\n" not in str(caught.value)


def test_budget_that_is_too_small():
    with pytest.raises(BudgetError, match=r"`budget` \(=200.0 KiB\) is .* below the least that an update needs"):
        fit(make(Small), MemoryBudget("200KiB"), accumulate_grad_batches=2)
    with pytest.raises(ValueError, match=r"`budget` \(='much'\)"):
        MemoryBudget("much")
    with pytest.raises(TypeError, match=r"`policies` \(='store'\) must be a sequence"):
        MemoryBudget("1MiB", policies="store")


def test_import_without_lightning_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("revnet.lightning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(MissingDependencyError, match=r"needs lightning, which is not installed; run `pip install"):
        importlib.import_module("revnet.lightning")
