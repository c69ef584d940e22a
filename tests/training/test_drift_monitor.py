"""The monitor records the drift of the updates themselves and does not change the run."""

import csv

import lightning.pytorch as lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import revnet
from revnet import ReversibleBlock, ReversibleSequential
from revnet.conversion import Dr2Net
from revnet.coupling import FixedPoint
from revnet.engine._drift import active_meter
from revnet.nn import set_coupling
from revnet.numerics import measure_drift
from revnet.training import DriftMonitor, TrainConfig, load_classifier, resume, train
from revnet.training.run.trainer import quiet
from tests.conversion.hosts import Host
from tests.helpers import mlp


class OwnModule(lightning.LightningModule):
    """A module as a user writes it."""

    def __init__(self, depth=3):
        super().__init__()
        self.net = ReversibleSequential(*[ReversibleBlock(mlp(4), mlp(4)) for _ in range(depth)])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def loss(self, batch):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(module, *callbacks, num_epochs=2, accumulate=1):
    torch.manual_seed(5)
    batches = DataLoader(TensorDataset(torch.randn(48, 8)), batch_size=8)
    with quiet():
        trainer = lightning.Trainer(
            max_epochs=num_epochs,
            callbacks=list(callbacks),
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            accumulate_grad_batches=accumulate,
        )
        trainer.fit(module, batches)
    return trainer


def make_module(**options):
    torch.manual_seed(0)
    return OwnModule(**options)


def test_monitors_a_user_module_without_changing_it(tmp_path):
    plain, watched = make_module(), make_module()
    run(plain)
    monitor = DriftMonitor(4, path=tmp_path / "drift.csv")
    trainer = run(watched, monitor)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))
    assert list(monitor.measured) == [0, 4, 8]  # of twelve updates
    assert all(0 < drift.error < 1e-5 for drift in monitor.measured.values())  # the rounding of float32
    assert float(trainer.callback_metrics["drift"]) == pytest.approx(monitor.measured[8].error)
    with (tmp_path / "drift.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["update"], row["block"]) for row in rows[:4]] == [
        ("0", "net.blocks.0"),
        ("0", "net.blocks.1"),
        ("0", "net.blocks.2"),
        ("4", "net.blocks.0"),
    ]
    assert float(rows[3]["error"]) == monitor.measured[4].blocks[0].error


def test_measures_the_update_itself():
    module, monitor = make_module(), DriftMonitor(100)
    torch.manual_seed(5)
    first = torch.randn(48, 8)[:8]
    expected = measure_drift(module.net, first, loss=lambda y: y.square().mean())
    run(module, monitor)
    assert [block.error for block in monitor.measured[0].blocks] == [block.error for block in expected.blocks]


def test_measures_gradients_without_changing_the_run(tmp_path):
    plain, watched = make_module(), make_module()
    run(plain)
    monitor = DriftMonitor(6, path=tmp_path / "drift.csv", loss=OwnModule.loss)
    run(watched, monitor)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))
    for drift in monitor.measured.values():
        assert 0 < drift.gradient.relative_error < 1e-5
    assert "net.blocks.0" in (tmp_path / "drift.csv").read_text()


def test_measures_the_first_batch_of_an_update():
    monitor = DriftMonitor(1)
    run(make_module(), monitor, num_epochs=1, accumulate=3)
    assert list(monitor.measured) == [0, 1]


class SkipsTheRest(OwnModule):
    """A module that skips the rest of an epoch in its second batch, as Lightning allows."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 1 else None


def test_measures_again_after_the_rest_of_an_epoch_was_skipped():
    monitor = DriftMonitor(1)
    torch.manual_seed(0)
    run(SkipsTheRest(), monitor, num_epochs=3)
    assert active_meter() is None
    assert list(monitor.measured) == [0, 1, 2]


def test_exact_runs_have_no_drift():
    module, monitor = make_module(), DriftMonitor(4)
    set_coupling(module, FixedPoint())
    run(module, monitor)
    assert [drift.error for drift in monitor.measured.values()] == [0, 0, 0]


def test_monitors_converted_blocks(tmp_path):
    module = make_module()
    module.net = Host(3)
    module.net.stem = nn.Linear(8, 16)
    revnet.convert(module.net.blocks, Dr2Net(0.5, 0.5))
    monitor = DriftMonitor(4, path=tmp_path / "drift.csv", loss=lambda module, batch: module.loss(batch))
    run(module, monitor)
    assert list(monitor.measured) == [0, 4, 8]
    with (tmp_path / "drift.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["block"] for row in rows] == [f"net.blocks.{index}" for index in range(3)] * 3
    assert all(0 < float(row["error"]) < 1e-5 and float(row["gradient_error"]) < 1e-4 for row in rows)


def test_rejects_a_module_without_reversible_blocks():
    module = make_module()
    module.net = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="`DriftMonitor` found no reversible block in OwnModule"):
        run(module, DriftMonitor())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, r"`every` \(=0\) must be 1 or more"),
        ({"every": 2.5}, TypeError, r"`every` \(=2.5\) must be an integer"),
        ({"loss": 3}, TypeError, r"`loss` \(=3\) must be a function"),
    ],
)
def test_rejects_invalid_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        DriftMonitor(**arguments)


class StopAfter(lightning.Callback):
    def __init__(self, num_epochs):
        self.num_epochs = num_epochs

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.num_epochs:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{"exact": True}, {"tolerance": 1e-6}], ids=["exact", "tolerance"])
def test_resumed_run_has_the_same_figures_and_weights(tmp_path, mode):
    config = {"epochs": 3, "batch_size": 400, "drift_every": 2, **mode}
    whole = train(TrainConfig(**config, out_dir=str(tmp_path / "whole")), quiet=True)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**config, out_dir=str(tmp_path / "stopped")), quiet=True, callbacks=[StopAfter(1)])
    resume(tmp_path / "stopped", quiet=True)
    folders = [whole.folder, tmp_path / "stopped"]
    tables = [(folder / "drift.csv").read_text() for folder in folders]
    assert tables[0] == tables[1]
    assert [line.split(",")[0] for line in tables[0].splitlines()[1::7]] == ["0", "2", "4", "6", "8"]
    weights = [load_classifier(folder).state_dict() for folder in folders]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with (whole.folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    model = load_classifier(whole.folder).model
    if "exact" in mode:
        assert [(row["drift"], row["keyframes"]) for row in rows] == [("0.0", "0.0")] * 3
        # The header of the weights remembers the coupling.
        assert all(block.coupling == FixedPoint() for block in model.stages[0].reversible)
    else:
        assert all(0 < float(row["drift"]) <= 1e-6 and float(row["keyframes"]) >= 1 for row in rows)


def test_rejects_reversible_settings_for_other_models():
    for setting in ({"exact": True}, {"tolerance": 1e-3}, {"drift_every": 5}):
        (name,) = setting
        with pytest.raises(
            ValueError, match=rf"`{name}` \(=.*\) is for reversible models; resnet32 reconstructs nothing"
        ):
            train(TrainConfig(model="resnet32", **setting), quiet=True)
