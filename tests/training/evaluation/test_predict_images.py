import csv
from pathlib import Path

import pytest
import torch

from revnet.data import load_image
from revnet.errors import CheckpointError, DataError
from revnet.training import load_classifier, predict_images
from revnet.training.evaluation.predict_images import Answer, ImagePrediction, predict_each, save_predictions
from revnet.training.image_data import read_image
from tests.training.samples import make_header, save_checkpoint, write_images

NAMES = tuple(f"class{number}" for number in range(7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint and five images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("prediction")
    save_checkpoint(folder / "last.safetensors", make_header(NAMES))
    write_images(folder / "images", 5)
    return folder


@pytest.fixture
def images(folder):
    return sorted((folder / "images").iterdir())


def test_answers_are_the_most_probable_classes(folder, images):
    predictions = predict_images(folder, images, top=7)
    assert [prediction.path for prediction in predictions] == images
    classifier = load_classifier(folder)
    for file, prediction in zip(images, predictions, strict=True):
        with torch.no_grad():
            logits = classifier(load_image(file, image_size=(8, 8), in_channels=3)[None])
        expected = dict(zip(NAMES, logits.softmax(1)[0].tolist(), strict=True))
        assert dict(prediction.answers) == pytest.approx(expected, rel=1e-4)
        probabilities = [answer.probability for answer in prediction.answers]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1)


def test_returns_at_most_top_answers(folder, images):
    for top, expected in ((1, 1), (5, 5), (100, 7)):
        (prediction,) = predict_images(folder, images[:1], top=top)
        assert len(prediction.answers) == expected
    assert len(predict_images(folder, images[:1])[0].answers) == 5
    assert predict_images(folder, []) == []


def test_accepts_strings_and_any_batch_size(folder, images):
    expected = predict_images(folder, images)
    for batch_size in (1, 2):
        for prediction, other in zip(
            predict_images(folder, map(str, images), batch_size=batch_size, device="cpu"), expected, strict=True
        ):
            assert prediction.path == other.path
            assert dict(prediction.answers) == pytest.approx(dict(other.answers), rel=1e-4)


def test_converts_images_to_the_training_shape(tmp_path, images):
    for image_shape, options in (((1, 6, 9), {}), ((3, 16, 16), {"is_resized": True})):
        header = make_header(NAMES, image_shape=image_shape, **options)
        checkpoint = save_checkpoint(tmp_path / f"{image_shape[0]}.safetensors", header)
        (prediction,) = predict_images(checkpoint, images[:1], top=1)
        crop_fraction = 0.875 if header.is_resized else 1.0
        options = {"image_size": image_shape[1:], "in_channels": image_shape[0], "crop_fraction": crop_fraction}
        with torch.no_grad():
            logits = load_classifier(checkpoint)(load_image(images[0], **options)[None])
        assert prediction.answers[0].class_name == NAMES[int(logits.argmax())]
        assert prediction.answers[0].probability == pytest.approx(float(logits.softmax(1).max()), rel=1e-4)


def test_yields_predictions_batch_by_batch(folder, images):
    predictions = predict_each(folder, [images[0], images[1], Path("no such file")], batch_size=2)
    assert next(predictions).path == images[0]
    assert next(predictions).path == images[1]
    with pytest.raises(DataError, match="no such file"):
        next(predictions)


def test_on_error_receives_errors_of_unreadable_files(folder, images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    missing, directory = tmp_path / "missing.png", tmp_path
    with pytest.raises(DataError, match=r"broken\.png' cannot be decoded"):
        predict_images(folder, [images[0], broken])
    errors = []
    paths = [broken, images[0], missing, directory, images[1]]
    for batch_size in (None, 1):
        errors.clear()
        predictions = predict_images(folder, paths, batch_size=batch_size, on_error=errors.append)
        assert [prediction.path for prediction in predictions] == images[:2]
        assert [type(error) for error in errors] == [DataError] * 3
        assert all(str(path) in str(error) for path, error in zip((broken, missing, directory), errors, strict=True))


def test_writes_answers_as_csv(tmp_path):
    answers = (Answer("tench, Tinca", 0.75), Answer("été", 0.25))
    save_predictions([ImagePrediction(path=Path("a b.png"), answers=answers)], tmp_path / "answers.csv")
    with (tmp_path / "answers.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["file", "rank", "class", "probability"],
            ["a b.png", "1", "tench, Tinca", "0.75"],
            ["a b.png", "2", "été", "0.25"],
        ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"paths": "cat.png"}, TypeError, r"`paths` \(='cat.png'\) must be a list of files; pass \['cat.png'\]"),
        ({"top": 0}, ValueError, r"`top` \(=0\) must be 1 or more"),
        ({"batch_size": 0}, ValueError, r"`batch_size` \(=0\) must be 1 or more"),
        ({"device": "abacus"}, ValueError, r"`device` \(='abacus'\) is not a device"),
        ({"checkpoint": "nothing"}, CheckpointError, "`nothing` does not exist"),
    ],
)
def test_rejects_invalid_arguments_before_reading(folder, arguments, error, message):
    with pytest.raises(error, match=message):
        predict_each(**({"checkpoint": folder, "paths": []} | arguments))


def test_weights_cannot_demand_images_of_any_size(images, monkeypatch):
    with pytest.raises(DataError, match="resized to 20,000 x 20,000 pixels, as the weights say, which is more than 10"):
        read_image(images[0], (3, 20_000, 20_000), is_resized=True)
    for limit in ("0", "4e8", "-5", "9" * 12):
        monkeypatch.setenv("REVNET_MAX_PIXELS", limit)
        with pytest.raises(ValueError, match=rf"REVNET_MAX_PIXELS \(={limit}\) must be a number of pixels"):
            read_image(images[0], (3, 8, 8), is_resized=True)


def test_a_link_to_itself_does_not_stop_the_other_images(folder, tmp_path):
    write_images(tmp_path / "images", 2)
    (tmp_path / "images" / "loop.png").symlink_to("loop.png")
    errors = []
    assert len(predict_images(folder, [tmp_path / "images"], on_error=errors.append)) == 2
    assert len(errors) == 1
    assert "loop.png' is a link to 'loop.png'" in str(errors[0])
