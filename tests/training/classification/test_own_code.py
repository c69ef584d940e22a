import csv

import pytest
import torch

from revnet.errors import CheckpointError
from revnet.training import TrainConfig, load_classifier, train
from revnet.training.import_path import UserCodeError
from tests.training.own_code import Perceptron, tiny_revnet
from tests.training.samples import assert_same_run, train_and_resume

OWN = "tests.training.own_code"


def test_trains_a_model_of_ones_own(out_dir):
    result = train(TrainConfig(model=f"{OWN}:Perceptron", max_updates=2, out_dir=out_dir), quiet=True)
    assert result.peak_bytes > 0
    classifier = load_classifier(result.folder, model=Perceptron())
    assert classifier.header.model == f"{OWN}:Perceptron"
    assert classifier(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 10)


def test_records_the_drift_of_converted_blocks(out_dir):
    config = TrainConfig(model=f"{OWN}:converted", max_updates=2, drift_every=1, out_dir=out_dir)
    result = train(config, quiet=True)
    with (result.folder / "drift.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [f"classifier.model.2.{index}" for index in range(4)]
    assert [(row["update"], row["block"]) for row in rows] == [(update, name) for update in "01" for name in names]
    assert all(0 < float(row["error"]) < 1e-5 for row in rows)
    with (result.folder / "metrics.csv").open() as file:
        (epoch,) = csv.DictReader(file)
    assert float(epoch["drift"]) == pytest.approx(max(float(row["error"]) for row in rows))


def test_does_not_run_code_that_a_file_of_weights_names(out_dir):
    result = train(TrainConfig(model=f"{OWN}:Perceptron", max_updates=1, out_dir=out_dir), quiet=True)
    with pytest.raises(CheckpointError, match=r"your own code, which a file of weights must not run; build the model"):
        load_classifier(result.folder)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": f"{OWN}:Perceptrn"}, ValueError, r"has no `Perceptrn`; did you mean `Perceptron`\?"),
        ({"model": "tests.no_such:Net"}, ValueError, r"no module `tests.no_such` is installed or in the current"),
        ({"model": "tests/training/own_code.py:Net"}, ValueError, r"must be written package.module:attribute"),
        ({"model": f"{OWN}:NOT_A_MODEL"}, ValueError, r"must be an nn.Module, or a function that returns one; got int"),
        ({"model": f"{OWN}:raises"}, UserCodeError, r"failed when it was called"),
        ({"model": f"{OWN}:Perceptron", "exact": True}, ValueError, r"`exact` \(=True\) is for reversible models"),
        ({"model": f"{OWN}:Perceptron", "drift_every": 1}, ValueError, r"has no reversible block; leave it out"),
        (
            {"model": f"{OWN}:converted", "exact": True},
            ValueError,
            r"`exact` \(=True\) does not change converted blocks",
        ),
        ({"model": f"{OWN}:converted", "tolerance": 1e-3}, ValueError, r"set `fraction_bits` in the method of `revnet"),
        ({"data": f"{OWN}:raises"}, UserCodeError, r"failed when it was called"),
        ({"data": f"{OWN}:Perceptron"}, ValueError, r"must be a LightningDataModule, or a function that returns one"),
        ({"data": f"{OWN}:OnlyTraining"}, ValueError, r"must have a `test_dataloader` or a `val_dataloader`"),
        ({"data": f"{OWN}:WrongLabels"}, ValueError, r"has labels from 0 to 3, which must be below the number of"),
        (
            {"data": f"{OWN}:Noise", "accumulate": 10},
            ValueError,
            r"`accumulate` \(=10\) is more than the batches of an",
        ),
        (
            {"data": f"{OWN}:Noise", "balanced_sampling": True},
            ValueError,
            r"can choose its images by a WeightedRandomS",
        ),
        ({"data": f"{OWN}:Noise", "preprocess": "imagenet"}, ValueError, r"is for images of bytes \(uint8\)"),
        ({"data": f"{OWN}:NoiseInBytes", "preprocess": "mean_image"}, ValueError, r"needs all images in memory"),
    ],
)
def test_rejects_what_is_not_a_model_or_not_data(settings, error, message, out_dir):
    with pytest.raises(error, match=message) as caught:
        train(TrainConfig(**settings, out_dir=out_dir), quiet=True)
    assert "\n" not in str(caught.value)


def test_error_of_the_users_code_is_kept(out_dir):
    with pytest.raises(UserCodeError) as caught:
        train(TrainConfig(model=f"{OWN}:raises", out_dir=out_dir), quiet=True)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("data", ["Noise", "NoiseInBytes"])
def test_trains_on_data_of_ones_own(data, out_dir):
    config = TrainConfig(data=f"{OWN}:{data}", model=f"{OWN}:tiny_revnet", batch_size=16, accumulate=2, epochs=1)
    result = train(TrainConfig(**vars(config) | {"out_dir": out_dir}), quiet=True)
    assert result.num_updates == 3
    assert result.batch_size == 16
    assert result.test.num_images == 48


def test_run_on_data_of_ones_own_resumes_bit_for_bit(tmp_path, monkeypatch):
    config = TrainConfig(data=f"{OWN}:Noise", model=f"{OWN}:tiny_revnet", epochs=3, batch_size=8)
    straight, resumed = train_and_resume(config, tmp_path, monkeypatch, stop_after=2)
    assert_same_run(straight, resumed, lambda path: load_classifier(path, model=tiny_revnet(4, 1)))
