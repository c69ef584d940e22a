"""A resumed run is equal to one that never stopped, bit for bit, from every checkpoint."""

from typing import Any

import pytest

from revnet.training import (
    LanguageConfig,
    NiceConfig,
    TrainConfig,
    load_classifier,
    load_density,
    load_language_model,
    resume,
)
from tests.training.samples import assert_same_run, train_with_copies, write_image_folder

TEXT = "The quick brown fox jumps over the lazy dog. " * 40

CLASSIFIER: dict[str, Any] = {"batch_size": 400, "epochs": 2, "crop_padding": 1, "horizontal_flip": True}
LANGUAGE: dict[str, Any] = {"length": 16, "batch_size": 4, "dim": 16, "depth": 2, "num_heads": 2, "epochs": 2}


@pytest.mark.parametrize(
    ("config", "load"),
    [
        (TrainConfig(**CLASSIFIER), load_classifier),
        (TrainConfig(**CLASSIFIER, drift_every=2, tolerance=1e-3, max_updates=5), load_classifier),
        (NiceConfig(batch_size=400, epochs=2, num_couplings=2, hidden_dim=16, num_hidden=1), load_density),
    ],
    ids=["classifier", "drift", "density"],
)
def test_resumes_from_every_checkpoint(tmp_path, config, load):
    result, copies = train_with_copies(config, tmp_path)
    assert len(copies) == result.num_updates
    for copy in copies:
        resumed = resume(copy, quiet=True)
        assert_same_run(result, resumed, load)
        assert resumed.best_epoch == result.best_epoch


@pytest.mark.parametrize("attention", ["full", "lsh"])
def test_language_model_resumes_from_every_checkpoint(tmp_path, attention):
    (tmp_path / "fox.txt").write_text(TEXT)
    more = {"dropout": 0.1, "updates_per_epoch": 3, "attention": attention}
    if attention == "lsh":
        more |= {"bucket_size": 4, "num_hashes": 2}
    config = LanguageConfig(data=str(tmp_path / "fox.txt"), **LANGUAGE, **more)
    result, copies = train_with_copies(config, tmp_path)
    assert len(copies) == 6
    for copy in copies:
        assert_same_run(result, resume(copy, quiet=True), load_language_model)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_in_files_resume_from_every_checkpoint(tmp_path, num_workers):
    data = write_image_folder(tmp_path / "data", num_images=6)
    config = TrainConfig(
        data=str(data), image_size=8, batch_size=4, epochs=2, val_fraction=0.2, num_workers=num_workers, num_threads=1
    )
    result, copies = train_with_copies(config, tmp_path)
    assert len(copies) == result.num_updates > 4
    for copy in copies:
        assert_same_run(result, resume(copy, quiet=True), load_classifier)
