"""Fitting NICE to images, from the settings to the files of a run."""

import json

import matplotlib.image
import pytest
import torch

from revnet.data import load_dataset
from revnet.errors import BudgetError, CheckpointError
from revnet.memory import measure
from revnet.memory.step._live import LiveBytes
from revnet.models import NICE
from revnet.nn import Store
from revnet.training import NiceConfig, evaluate, load_classifier, load_density, train
from revnet.training.density.job import new_job
from revnet.training.density.model import ImageDensity, mean_bits_per_dim
from tests.training.samples import (
    RUN_FILES,
    assert_same_run,
    read_log,
    train_and_resume,
)

CHECKPOINT = "checkpoints/update-00000012.ckpt"
SMALL = {"num_couplings": 4, "hidden_dim": 32, "num_hidden": 1, "batch_size": 200}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run of two epochs in a shared folder: do not change it."""
    return train(NiceConfig(epochs=2, out_dir=str(tmp_path_factory.mktemp("runs") / "nice"), **SMALL), quiet=True)


def test_run_writes_its_files(fitted):
    assert sorted(path.name for path in fitted.folder.iterdir()) == RUN_FILES
    assert matplotlib.image.imread(fitted.folder / "learning_curve.png").std() > 0.05


def test_bits_per_dimension_decrease(fitted):
    first, second = read_log(fitted.folder)
    assert float(second["train_loss"]) < float(first["train_loss"])
    assert float(second["val_loss"]) < float(first["val_loss"])
    assert fitted.best_val_bits_per_dim == pytest.approx(float(second["val_loss"]))
    assert fitted.best_epoch == 2


def test_summary_repeats_the_result(fitted):
    summary = json.loads((fitted.folder / "summary.json").read_text())
    assert summary["test_bits_per_dim"] == fitted.test_bits_per_dim
    assert (summary["model"], summary["data"], summary["test_images"]) == ("nice", "digits", 360)
    assert summary["peak_bytes"] == fitted.peak_bytes
    assert "test bits/dim" in fitted.report()


def test_memory_equals_measured_model_and_stored_twin(fitted):
    batch, expected = torch.rand(200, 1, 8, 8), []
    for policy in (None, Store()):
        model = NICE(image_shape=(1, 8, 8), num_couplings=4, hidden_dim=32, num_hidden=1, policy=policy)
        expected.append(measure(model, batch).activation_bytes)
    assert [fitted.peak_bytes, fitted.stored_peak_bytes] == expected
    assert fitted.peak_bytes < fitted.stored_peak_bytes


def test_evaluates_last_and_best_weights(fitted):
    images = load_dataset("digits").test.images
    for name, expected in (("last", fitted.test_bits_per_dim), ("best", fitted.best_test_bits_per_dim)):
        density = load_density(fitted.folder / f"{name}.safetensors")
        assert mean_bits_per_dim(density, images, torch.device("cpu")) == expected


def test_weights_and_checkpoint_hold_the_same_weights(fitted):
    states = [load_density(fitted.folder / name).state_dict() for name in ("last.safetensors", CHECKPOINT)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert load_density(fitted.folder).header.num_levels == 17


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id=""),
        pytest.param({"memory_budget": "1MiB", "prior": "gaussian"}, id="planned", marks=pytest.mark.slow),
    ],
)
def test_stopped_run_resumes_bit_for_bit(tmp_path, monkeypatch, more):
    settings = SMALL | {"epochs": 4, "horizontal_flip": True} | more  # noise and flips are random
    straight, resumed = train_and_resume(NiceConfig(**settings), tmp_path, monkeypatch, stop_after=2)
    assert_same_run(straight, resumed)
    assert resumed.test_bits_per_dim == straight.test_bits_per_dim
    assert (resumed.best_epoch, resumed.best_val_bits_per_dim) == (straight.best_epoch, straight.best_val_bits_per_dim)


def test_update_stays_within_its_budget(out_dir):
    from lightning.pytorch import Callback

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            model = module.density.model
            state = [tensor for moments in trainer.optimizers[0].state.values() for tensor in moments.values()]
            tensors = [*model.parameters(), *batch, *state]
            self.constant_bytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
            self.live = LiveBytes([*tensors, *module.buffers()])
            self.live.__enter__()

        def on_train_batch_end(self, *args):
            self.live.__exit__(None, None, None)
            self.peak = self.constant_bytes + self.live.peak_bytes

    watch = Watch()
    config = NiceConfig(max_updates=2, memory_budget="600KiB", out_dir=out_dir, **SMALL)
    result = train(config, quiet=True, callbacks=[watch])
    assert result.policy == "plan"
    assert result.planned_peak_bytes <= result.memory_budget_bytes == 600 * 1024
    # The plan counts the images as floats; the budget does not count data, here the noise and the bytes.
    assert watch.peak <= result.planned_peak_bytes + 4 * 200 * 64 * 4


def test_last_weights_are_best_without_validation(out_dir):
    result = train(NiceConfig(max_updates=1, val_fraction=0, out_dir=out_dir, **SMALL), quiet=True)
    assert (result.best_val_bits_per_dim, result.best_test_bits_per_dim) == (None, None)
    assert mean_bits_per_dim(
        load_density(result.folder), load_dataset("digits").test.images, torch.device("cpu")
    ) == pytest.approx(result.test_bits_per_dim, abs=0)


@pytest.mark.parametrize("prior", ["logistic", "gaussian"])
def test_initial_codes_have_the_deviation_of_the_prior(prior):
    density = new_job(NiceConfig(prior=prior, **SMALL)).task.density
    codes, _ = density.model(density.dequantize(load_dataset("digits").train.images))
    expected = {"logistic": torch.pi / 3**0.5, "gaussian": 1.0}[prior]
    assert (codes.std(0) / expected - 1).abs().max() < 0.3, "the scale is computed from the first thousand images"


def test_bits_per_dimension_follow_the_definition():
    """The log-probability of bytes is the log-probability of the numbers less the log of the cells' number."""
    density: ImageDensity = new_job(NiceConfig(**SMALL)).task.density
    images = load_dataset("digits").test.images[:10]
    x = density.dequantize(images, torch.Generator().manual_seed(0))
    nats = density.model.log_prob(x) - 64 * torch.tensor(17.0).log()
    torch.testing.assert_close(
        density(images, torch.Generator().manual_seed(0)), -nats / (64 * torch.tensor(2.0).log())
    )


def test_rejects_other_kinds_of_weights(fitted, finished):
    with pytest.raises(CheckpointError, match=r"holds a density of images, not a classifier; use `revnet sample` or"):
        load_classifier(fitted.folder)
    with pytest.raises(CheckpointError, match=r"holds a density of images, not a classifier; use `revnet sample` or"):
        evaluate(fitted.folder)
    with pytest.raises(
        CheckpointError, match=r"holds a classifier, not a density of images; use `revnet evaluate` or `revnet pr"
    ):
        load_density(finished.folder)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data": "digit"}, ValueError, "did you mean 'digits'"),
        ({"batch_size": 1294}, ValueError, r"`batch_size` \(=1294\) must not exceed the 1,293 training images"),
        ({"memory_budget": "10KiB"}, BudgetError, r"`memory_budget` \(='10KiB'\) is "),
    ],
)
def test_rejects_invalid_settings_before_writing(tmp_path, monkeypatch, settings, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        train(NiceConfig(**SMALL | settings))
    assert not list(tmp_path.iterdir())
