"""Every file in `configs/` is a complete recipe that the command line takes."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from revnet.cli._parser import parse
from revnet.cli.train import train
from revnet.models import list_models
from revnet.training import TrainConfig

FOLDER = Path(__file__).parents[2] / "configs"
PATHS = sorted(FOLDER.glob("*/*.yaml"))


def load(path):
    return TrainConfig(**parse(train, "revnet train", ["--config", str(path)]))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_is_complete_and_named_after_its_data_and_model(path):
    config = load(path)
    assert (config.data, config.model) == (path.parent.name, path.stem)
    assert config.model in list_models()
    assert yaml.safe_load(path.read_text()).keys() == {field.name for field in fields(TrainConfig)}


def test_there_are_these_files():
    assert {f"{path.parent.name}/{path.stem}" for path in PATHS} == {
        "cifar10/resnet32",
        "cifar10/revnet38",
        "digits/revnet38",
    }


def test_the_recipe_for_digits_is_the_default():
    assert load(FOLDER / "digits" / "revnet38.yaml") == TrainConfig()


def test_the_pair_on_cifar10_differs_in_the_model_only():
    resnet, revnet = (load(FOLDER / "cifar10" / f"{name}.yaml") for name in ("resnet32", "revnet38"))
    assert replace(resnet, model="revnet38") == revnet


def test_the_recipe_for_cifar10_is_the_papers():
    config = load(FOLDER / "cifar10" / "revnet38.yaml")
    assert config.epochs * 50_000 / config.batch_size == 80_000
    assert [round(80_000 * fraction) for fraction in config.decay_at] == [40_000, 60_000]
    assert (config.batch_size, config.lr, config.decay_factor, config.momentum) == (100, 0.1, 0.1, 0.9)
    assert (config.weight_decay, config.val_fraction, config.preprocess) == (2e-4, 0, "mean_image")
    assert (config.crop_padding, config.horizontal_flip) == (2, True)
