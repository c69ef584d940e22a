import pytest
import torch

from revnet.cli.train import train as train_command
from revnet.errors import CheckpointError
from revnet.training import TrainConfig, load_classifier, train
from tests.training.samples import make_header, save_checkpoint

TINY = "tests.training.own_code:tiny_revnet"
OWN = "tests.training.own_code"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one update on digits."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train(TrainConfig(model="revnet38", max_updates=1, batch_size=400, out_dir=str(folder)), quiet=True).folder


def test_continues_with_the_same_classes(trained, out_dir, capsys):
    config = TrainConfig(weights=str(trained), max_updates=1, batch_size=400, lr=1e-12, weight_decay=0, out_dir=out_dir)
    result = train(config)
    assert f"weights  {trained / 'last.safetensors'}, all loaded" in capsys.readouterr().out
    old, new = (dict(load_classifier(folder).named_parameters()) for folder in (trained, result.folder))
    for name, parameter in new.items():
        torch.testing.assert_close(parameter, old[name], rtol=1e-6, atol=1e-6)


def test_other_classes_get_a_new_head(trained, out_dir, capsys):
    config = TrainConfig(
        weights=str(trained), data=f"{OWN}:NoiseInBytes", max_updates=1, lr=1e-12, weight_decay=0, out_dir=out_dir
    )
    result = train(config)
    line = f"{trained / 'last.safetensors'}, except head.bias, head.weight, which are new (4 classes, not the 10 of"
    assert line in capsys.readouterr().out
    old, new = (load_classifier(folder) for folder in (trained, result.folder))
    assert new.model.head.weight.shape[0] == 4
    torch.testing.assert_close(new.model.stem[0].weight, old.model.stem[0].weight, rtol=1e-6, atol=1e-6)
    assert torch.equal(new.preprocess.mean, old.preprocess.mean), "as in the training of the weights"


def test_preprocess_of_the_settings_comes_first(trained, out_dir):
    config = TrainConfig(weights=str(trained), preprocess="unit_range", max_updates=1, batch_size=400, out_dir=out_dir)
    assert float(load_classifier(train(config, quiet=True).folder).preprocess.mean) == 127.5


@pytest.mark.parametrize(
    ("header", "settings", "message"),
    [
        (
            {"model": "resnet32"},
            {},
            r"are of the model resnet32, not of `model` \(='revnet38'\); pass `model` resnet32",
        ),
        (
            {"image_shape": (3, 8, 8)},
            {},
            r"are for images with 3 channels, and the data have 1; pass weights that were",
        ),
        (
            {"image_shape": (3, 8, 8)},
            {"preprocess": "standardize"},
            r"do not fit the model: `stem.0.weight` is \(.*\) in",
        ),
    ],
)
def test_rejects_weights_that_do_not_fit(tmp_path, header, settings, message, out_dir):
    options = {"model": "revnet38", "image_shape": (1, 8, 8)} | header
    path = save_checkpoint(tmp_path / "other.safetensors", make_header(**options))
    with pytest.raises(CheckpointError, match=message) as caught:
        train(TrainConfig(weights=str(path), **settings, out_dir=out_dir), quiet=True)
    assert "\n" not in str(caught.value)


def test_rejects_missing_weights(tmp_path, out_dir):
    with pytest.raises(CheckpointError, match=r"`.*no_such` does not exist"):
        train(TrainConfig(weights=str(tmp_path / "no_such"), out_dir=out_dir), quiet=True)


def test_command_takes_the_model_of_the_weights(tmp_path, out_dir):
    path = save_checkpoint(tmp_path / "other.safetensors", make_header(model="resnet32", image_shape=(1, 8, 8)))
    train_command(weights=str(path), max_updates=1, batch_size=400, out_dir=out_dir)
    assert load_classifier(out_dir).header.model == "resnet32"


def test_frozen_parts_do_not_change(trained, out_dir, capsys):
    config = TrainConfig(
        weights=str(trained), freeze="stem,stages.0*", max_updates=2, batch_size=400, ema_decay=0.5, out_dir=out_dir
    )
    result = train(config)
    assert "frozen   " in capsys.readouterr().out
    old, new = (load_classifier(folder).model.state_dict() for folder in (trained, result.folder))
    changed = {name for name, tensor in new.items() if not torch.equal(tensor, old[name])}
    assert changed
    assert not any(name.startswith(("stem", "stages.0")) for name in changed), "statistics of batch norms included"
