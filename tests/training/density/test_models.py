"""RealNVP and Glow, and photographs in a folder, from the settings to the files of a run."""

import json

import pytest
import torch

from revnet.data import load_dataset
from revnet.errors import CheckpointError
from revnet.models import Glow, RealNVP
from revnet.training import NiceConfig, load_density, sample, train
from revnet.training.density.images import load_images
from revnet.training.density.job import new_job
from tests.training.samples import assert_same_run, train_and_resume, write_image_folder

SMALL = {"num_couplings": 2, "hidden_dim": 8, "batch_size": 200, "prior": "gaussian", "weight_decay": 0.0}
TYPES = {"glow": Glow, "realnvp": RealNVP}
all_models = pytest.mark.parametrize("model", TYPES)


@pytest.mark.parametrize("model", ["glow", pytest.param("realnvp", marks=pytest.mark.slow)])
def test_stopped_run_resumes_bit_for_bit(tmp_path, monkeypatch, model):
    config = NiceConfig(model=model, epochs=2, horizontal_flip=True, **SMALL)
    straight, resumed = train_and_resume(config, tmp_path, monkeypatch, stop_after=1)
    assert_same_run(straight, resumed)
    assert resumed.test_bits_per_dim == straight.test_bits_per_dim
    assert straight.peak_bytes < straight.stored_peak_bytes
    assert json.loads((straight.folder / "summary.json").read_text())["model"] == model
    density = load_density(straight.folder)
    assert isinstance(density.model, TYPES[model])
    assert density.header.model == model
    flags = [tensor for name, tensor in density.state_dict().items() if name.endswith("is_initialized")]
    assert len(flags) > 2
    assert all(flags)
    samples = sample(straight.folder, num_samples=3, missing="left", num_steps=1, out_dir=tmp_path / "drawn")
    assert samples.images.shape == (3, 1, 8, 8)
    assert samples.test_bits_per_dim == straight.test_bits_per_dim


@all_models
def test_first_codes_have_about_unit_scale(model):
    density = new_job(NiceConfig(model=model, **SMALL)).task.density
    codes, _ = density.model(density.dequantize(load_dataset("digits").train.images))
    assert 0.7 < codes.std() < 1.4


def test_weights_of_a_model_do_not_start_another(tmp_path):
    run = train(NiceConfig(model="glow", max_updates=1, out_dir=str(tmp_path / "glow"), **SMALL), quiet=True)
    with pytest.raises(CheckpointError, match=r"`weights` \(='.*'\) do not fit the model"):
        train(NiceConfig(model="realnvp", weights=str(run.folder), out_dir=str(tmp_path / "other"), **SMALL))
    again = new_job(NiceConfig(model="glow", weights=str(run.folder), **SMALL)).task.density
    assert all(
        torch.equal(tensor, load_density(run.folder).state_dict()[name]) for name, tensor in again.state_dict().items()
    )


def test_photographs_in_a_folder(tmp_path):
    folder = write_image_folder(tmp_path / "images", num_images=8)
    settings = {**SMALL, "batch_size": 8, "image_size": 16, "val_fraction": 0.2, "max_updates": 2}
    run = train(NiceConfig(data=str(folder), model="glow", out_dir=str(tmp_path / "run"), **settings), quiet=True)
    density = load_density(run.folder)
    assert density.header.image_shape == (3, 16, 16)
    assert density.header.is_resized
    assert sample(run.folder, num_samples=1).num_test_images == 24


def test_photographs_are_decoded_like_test_images(tmp_path):
    folder = write_image_folder(tmp_path / "images", num_images=3)
    loaded, expected = load_images(str(folder), image_size=16), load_dataset(folder, image_size=16)
    assert loaded.train.images.shape == (9, 3, 16, 16)
    for index in range(9):
        assert torch.equal(loaded.test.images[index], expected.test[index][0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "FOLDER"}, r"`data` \(='.*'\) holds photographs of any size, .*; pass `image_size`, such as 32"),
        (
            {"data": "FOLDER", "image_size": 15, "model": "glow", "val_fraction": 0},
            r"`image_size` \(=15\) must be a multiple of 4, .* pass 12 or 16, or fewer `num_scales` than 2",
        ),
        ({"data": "FOLDER", "image_size": 100_000}, r"`image_size` \(=100000\) would make .* pass a smaller one"),
        ({"image_size": 32}, r"`image_size` \(=32\) is for images of varying size, but the images of 'digits'"),
        ({"model": "glow", "num_hidden": 3}, r"`num_hidden` \(=3\) is for nice and realnvp"),
        (
            {"model": "glow", "num_scales": 4},
            r"`num_scales` \(=4\) must be at most 3, since each scale of glow halves the sides",
        ),
        ({"num_scales": 3}, r"`num_scales` \(=3\) is for realnvp and glow, since nice has no scales; leave it out"),
        ({"model": "flow"}, r"`model` \(='flow'\) must be `nice` or `realnvp` or `glow`"),
    ],
)
def test_rejects_settings_that_do_not_fit(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    folder = write_image_folder(tmp_path / "images")
    settings = {name: str(folder) if value == "FOLDER" else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=message) as caught:
        train(NiceConfig(**{"batch_size": 4, **settings}))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
