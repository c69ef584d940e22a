"""Runs with the settings of a recipe resume bit for bit, within an epoch and after its end."""

import pytest

from revnet.training import LanguageConfig, TrainConfig, load_classifier, resume
from tests.training.own_code import tiny_revnet
from tests.training.run.test_resume import LANGUAGE
from tests.training.samples import assert_same_run, train_with_copies, write_text

OWN = "tests.training.own_code"

RECIPES = {
    "average": {"ema_decay": 0.9, "accumulate": 2, "val_every": 2},
    "plateau": {"schedule": "plateau", "plateau_patience": 0, "warmup": 0.3, "val_every": 1, "precision": "16-mixed"},
    "muon": {"optimizer": "muon", "schedule": "restarts", "precision": "bf16-true", "dropout": 0.1},
    "backward": {"step_in_backward": True, "max_grad_norm": None, "max_grad_value": 0.1},
    "patience": {"patience": 1, "val_every": 1, "lr": 1e-12, "ema_decay": 0.5},
}
QUICK = ("average", "plateau", "patience")
SLOW = ("muon", "backward")


@pytest.mark.parametrize("recipe", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_language_model_resumes_bit_for_bit(tmp_path, recipe):
    settings = LANGUAGE | {"updates_per_epoch": 3, "val_windows": 4} | RECIPES[recipe]
    config = LanguageConfig(data=write_text(tmp_path), **settings)
    result, copies = train_with_copies(config, tmp_path)
    assert len(copies) >= result.num_updates
    for copy in copies[1::2]:
        resumed = resume(copy, quiet=True)
        assert_same_run(result, resumed)
        assert resumed.best_val_loss == result.best_val_loss


@pytest.mark.parametrize(
    ("settings", "num_classes"),
    [
        ({"mixup": 0.2, "cutmix": 1.0, "balanced_sampling": True, "ema_decay": 0.9, "accumulate": 2}, 10),
        pytest.param({"data": f"{OWN}:Noise", "batch_size": 16, "ema_decay": 0.9}, 4, marks=pytest.mark.slow),
    ],
    ids=["mixing", "own-data"],
)
def test_classifier_resumes_bit_for_bit(tmp_path, settings, num_classes):
    config = TrainConfig(**{"model": f"{OWN}:tiny_revnet", "batch_size": 400, "epochs": 2} | settings)
    result, copies = train_with_copies(config, tmp_path)
    assert len(copies) == result.num_updates
    for copy in copies[1::2]:
        resumed = resume(copy, quiet=True)
        assert_same_run(result, resumed, lambda path: load_classifier(path, model=tiny_revnet(num_classes, 1)))
