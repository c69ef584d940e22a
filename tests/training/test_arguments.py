"""Arguments of the wrong type: one line that names the argument, and says what to pass."""

from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Callback

from revnet.data import load_dataset, load_image, load_text
from revnet.training import (
    NiceConfig,
    TrainConfig,
    evaluate,
    find_lr,
    load_classifier,
    load_density,
    predict_images,
    push,
    resume,
    sample,
    score_images,
    train,
)
from tests.training.samples import make_header, save_checkpoint, write_images


def assert_refused(call, message, error=TypeError):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", [train, find_lr])
@pytest.mark.parametrize("config", [None, 3, {"epochs": 1}, TrainConfig])
def test_settings(function, config):
    assert_refused(lambda: function(config), r"^`config` \(=.*\) must be a TrainConfig, NiceConfig or LanguageConfig; ")


@pytest.mark.parametrize("call", [train, lambda _, **options: resume("nowhere", **options)], ids=["train", "resume"])
@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (None, r"^`callbacks` \(=None\) must be a list of Lightning's callbacks; pass \[\] for none\.$"),
        (Callback(), r"^`callbacks` \(=.*\) must be a list of Lightning's callbacks; put it in a list\.$"),
        ([1], r"^`callbacks` holds 1, but must hold objects of Lightning's Callback; pass objects of this class\.$"),
        ([Callback], r"^`callbacks` holds <class .*, but must hold .*; pass `Callback\(\)`\.$"),
    ],
    ids=["none", "single", "number", "class"],
)
def test_callbacks(call, callbacks, message):
    assert_refused(lambda: call(NiceConfig(), callbacks=callbacks), message)


@pytest.mark.parametrize("value", [None, 3, b"run"], ids=repr)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("folder", resume),
        ("path", load_classifier),
        ("path", load_density),
        ("checkpoint", evaluate),
        ("checkpoint", sample),
        ("checkpoint", lambda value: predict_images(value, [])),
        ("checkpoint", lambda value: score_images(value, [])),
        ("checkpoint", lambda value: push(value, "owner/name")),
        ("name_or_path", load_dataset),
        ("path", load_text),
        ("path", lambda value: load_image(value, image_size=(8, 8), in_channels=1)),
    ],
)
def test_paths(name, call, value):
    assert_refused(lambda: call(value), rf"^`{name}` \(={value!r}\) must be a path; pass ")


@pytest.mark.parametrize("function", [predict_images, score_images])
@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (None, r"^`paths` \(=None\) must be a list of files; pass"),
        (3, r"^`paths` \(=3\) must be a list of files; pass"),
        ("a.png", r"^`paths` \(='a.png'\) must be a list of files; pass \['a.png'\]"),
        (Path("a.png"), r"^`paths` \(='a.png'\) must be a list of files; pass \['a.png'\]"),
        ([b"a.png"], r"^`paths` holds b'a.png', but must be a list of paths"),
        ([3], r"^`paths` holds 3, but must be a list of paths"),
    ],
)
def test_lists_of_paths(function, paths, message):
    assert_refused(lambda: function("run", paths), message)


@pytest.mark.parametrize("images", [[1], np.zeros((1, 1, 8, 8), np.uint8)], ids=["list", "array"])
def test_images_that_are_no_tensor(tmp_path, images):
    save_checkpoint(tmp_path / "last.safetensors", make_header(image_shape=(1, 8, 8)))
    classifier = load_classifier(tmp_path)
    assert_refused(lambda: classifier(images), r"^`images` \(=.*\) must be a tensor; pass `torch.as_tensor\(images\)`")


def test_numbers_of_numpy_and_paths_are_settings(tmp_path):
    config = TrainConfig(
        epochs=np.int64(2),
        lr=np.float32(0.5),
        nesterov=np.bool_(True),
        decay_at=[np.float64(0.5)],
        out_dir=tmp_path / "run",
        data=tmp_path,
    )
    plain = TrainConfig(
        epochs=2, lr=0.5, nesterov=True, decay_at=[0.5], out_dir=str(tmp_path / "run"), data=str(tmp_path)
    )
    assert config == plain
    assert type(config.epochs) is int
    config.save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml") == plain
    assert_refused(lambda: TrainConfig(epochs=np.float64(2)), r"`epochs` \(=2.0\) must be an integer")
    assert_refused(lambda: TrainConfig(epochs=np.bool_(True)), r"`epochs` \(=True\) must be an integer")


def test_numbers_of_numpy_are_counts(tmp_path):
    save_checkpoint(tmp_path / "last.safetensors", make_header(image_shape=(1, 8, 8)))
    (file,) = write_images(tmp_path, 1)
    (prediction,) = predict_images(tmp_path, [file], top=np.int64(2), batch_size=np.int32(1))
    assert len(prediction.answers) == 2
