"""A resumed run is equal to one that never stopped, bit for bit, from every checkpoint."""

from dataclasses import replace
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from revnet.training import (
    LanguageConfig,
    NiceConfig,
    TrainConfig,
    TrainingInterrupted,
    resume,
    train,
)
from tests.training.run.test_stop import SendSignal
from tests.training.samples import TINY, assert_same_run, train_with_copies, write_image_folder, write_text

CLASSIFIER: dict[str, Any] = {
    "model": TINY,
    "batch_size": 700,
    "epochs": 2,
    "max_updates": 3,
    "crop_padding": 1,
    "horizontal_flip": True,
}
LANGUAGE: dict[str, Any] = {"length": 16, "batch_size": 4, "dim": 16, "depth": 2, "num_heads": 2, "epochs": 2}


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(**CLASSIFIER),
        pytest.param(TrainConfig(**CLASSIFIER, drift_every=2, tolerance=1e-3), marks=pytest.mark.slow),
        NiceConfig(batch_size=400, epochs=2, num_couplings=2, hidden_dim=16, num_hidden=1),
    ],
    ids=["classifier", "drift", "density"],
)
def test_resumes_from_every_checkpoint(tmp_path, config):
    result, copies = train_with_copies(config, tmp_path)
    assert len(copies) == result.num_updates
    for copy in copies:
        resumed = resume(copy, quiet=True)
        assert_same_run(result, resumed)
        assert resumed.best_epoch == result.best_epoch


class ValidateEvery(Callback):
    """Validate every `num_updates`, and collect the losses."""

    def __init__(self, num_updates):
        self.num_updates = num_updates
        self.losses = []

    def setup(self, trainer, pl_module, stage):
        trainer.val_check_interval = self.num_updates

    def on_validation_end(self, trainer, pl_module):
        self.losses.append(float(trainer.callback_metrics["val_loss"]))


def test_resumes_around_validations_within_an_epoch_and_an_early_end(tmp_path):
    def make_callbacks():
        # The loss falls, so this stops the run after the fifth of nine validations.
        return [ValidateEvery(2), EarlyStopping("val_loss", patience=4, mode="max", check_finite=False)]

    config = NiceConfig(batch_size=200, epochs=3, num_couplings=2, hidden_dim=16, num_hidden=1)
    callbacks = make_callbacks()
    result, copies = train_with_copies(config, tmp_path, callbacks)
    assert (result.num_updates, len(copies), len(callbacks[0].losses)) == (10, 10, 5)
    for number, copy in enumerate(copies, start=1):
        others = make_callbacks()
        assert_same_run(result, resume(copy, quiet=True, callbacks=others))
        # A checkpoint comes after the validation that follows its update.
        assert others[0].losses == callbacks[0].losses[number // 2 :]


def test_stop_before_a_validation_within_an_epoch_repeats_it(tmp_path):
    config = NiceConfig(batch_size=200, epochs=1, num_couplings=2, hidden_dim=16, num_hidden=1)
    straight = train(replace(config, out_dir=str(tmp_path / "straight")), quiet=True, callbacks=[ValidateEvery(2)])
    folder = tmp_path / "stopped"
    with pytest.raises(TrainingInterrupted, match=r"^stopped; .* continues after update 4\.$"):
        train(
            replace(config, out_dir=str(folder)),
            quiet=True,
            callbacks=[ValidateEvery(2), SendSignal("on_train_batch_end", 4)],
        )
    validations = ValidateEvery(2)
    assert_same_run(straight, resume(folder, quiet=True, callbacks=[validations]))
    assert len(validations.losses) == 2


@pytest.mark.parametrize("attention", ["full", pytest.param("lsh", marks=pytest.mark.slow)])
def test_language_model_resumes_from_every_checkpoint(tmp_path, attention):
    more = {"dropout": 0.1, "updates_per_epoch": 3, "attention": attention}
    if attention == "lsh":
        more |= {"bucket_size": 4, "num_hashes": 2}
    config = LanguageConfig(data=write_text(tmp_path), **LANGUAGE, **more)
    result, copies = train_with_copies(config, tmp_path)
    assert len(copies) == 6
    for copy in copies:
        assert_same_run(result, resume(copy, quiet=True))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_in_files_resume_from_every_checkpoint(tmp_path, num_workers):
    data = write_image_folder(tmp_path / "data", num_images=6)
    config = TrainConfig(
        data=str(data), image_size=8, batch_size=4, epochs=2, val_fraction=0.2, num_workers=num_workers, num_threads=1
    )
    result, copies = train_with_copies(config, tmp_path)
    assert len(copies) == result.num_updates > 4
    for copy in copies:
        assert_same_run(result, resume(copy, quiet=True))
