"""Runs on a folder of classes without `train` and `test`, with odd names."""

import shutil
from pathlib import Path

import pytest

from revnet.data import load_dataset
from revnet.data.decoding.image_draw import Draw
from revnet.errors import CheckpointError, DataError
from revnet.training import TrainConfig, evaluate, load_classifier, predict_images, resume, train
from revnet.training.classification.job import new_job
from tests.training.samples import write_image_folder, write_images

CLASSES = ("Bär & Kuh", "a $x^{$ b", "new\nline")
SETTINGS = {"model": "resnet32", "image_size": 16, "epochs": 1, "batch_size": 8, "num_workers": 0, "num_threads": 1}


def write_classes(folder: Path, counts: dict[str, int]) -> Path:
    """Write a folder of images for each class."""
    for number, (name, count) in enumerate(counts.items()):
        write_images(folder / name, count, seed=number)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the result of a run, the folder of its data, and the folder of the run."""
    tmp_path = tmp_path_factory.mktemp("plain")
    data = write_classes(tmp_path / "fünf $^{$ Tiere", dict.fromkeys(CLASSES, 10))
    result = train(TrainConfig(data=str(data), seed=3, out_dir=str(tmp_path / "run"), **SETTINGS), quiet=True)
    return result, data


@pytest.fixture
def data(finished, tmp_path):
    """Return a copy of the data, which may be changed."""
    return shutil.copytree(finished[1], tmp_path / "copy")


def test_evaluation_uses_the_images_that_were_held_out(finished):
    result, data = finished
    assert result.test.num_images == 6
    assert evaluate(result.folder) == result.test
    assert evaluate(result.folder).split_seed == 3
    header = load_classifier(result.folder).header
    held_out = load_dataset(data, seed=3)
    assert (header.split_seed, header.split_files) == (3, held_out.division.files)
    assert held_out.division != load_dataset(data, seed=0).division


def test_predictions_equal_the_evaluation(finished):
    """The images were decoded and cropped alike, so the same logits follow, up to the order of a sum in a batch."""
    result, data = finished
    test = load_dataset(data, image_size=16, seed=3).test
    classifier = load_classifier(result.folder)
    images, labels, *_ = test.__getitems__([Draw(0, 0, index) for index in range(len(test))])
    expected = classifier(images).softmax(1)
    predictions = predict_images(result.folder, [test.file(index) for index in range(len(test))], top=3)
    for prediction, probabilities in zip(predictions, expected, strict=True):
        by_class = dict(prediction.answers)
        assert [by_class[name] for name in classifier.header.class_names] == pytest.approx(
            probabilities.tolist(), abs=1e-6
        )
    counts = result.test.confusion
    assert counts.num_errors == int((expected.argmax(1) != labels).sum())


def test_a_moved_folder_is_divided_alike(finished, data):
    assert evaluate(finished[0].folder, data).confusion.counts.equal(finished[0].test.confusion.counts)


def test_an_added_image_is_refused(finished, data, tmp_path):
    run = shutil.copytree(finished[0].folder, tmp_path / "run")
    write_images(data / CLASSES[0], 1, seed=99)
    with pytest.raises(CheckpointError, match=r"`data` .* is not what the run was trained on: the number of "):
        resume(run, data=str(data), epochs=2, quiet=True)
    with pytest.raises(DataError, match=r"`data` .* shares 30 images with '.*', which the weights were trained on"):
        evaluate(run, data)


def test_an_image_that_replaces_another_is_refused(finished, data, tmp_path):
    run = shutil.copytree(finished[0].folder, tmp_path / "run")
    file = next((data / CLASSES[1]).iterdir())
    file.rename(file.with_name("another.png"))
    with pytest.raises(CheckpointError, match="is not what the run was trained on"):
        resume(run, data=str(data), epochs=2, quiet=True)
    with pytest.raises(DataError, match="shares 30 images with"):
        evaluate(run, data)


def test_all_images_of_a_new_folder_are_used(finished, tmp_path, caplog):
    run, data = finished[0].folder, write_classes(tmp_path / "new", {})
    write_images(data / CLASSES[1], 1, seed=50)
    write_images(data / CLASSES[2], 3, seed=51)
    result = evaluate(run, data)
    assert (result.num_images, result.split_seed) == (4, None)
    assert [row.num_images for row in result.confusion.per_class()] == [1, 3]
    copied = shutil.copy(next((finished[1] / CLASSES[0]).iterdir()), data / CLASSES[1] / "copy.png")
    with pytest.raises(DataError, match=r"shares 1 image with .* \(the first is '.*copy.png'\); remove it, or"):
        evaluate(run, data)
    Path(copied).unlink()
    write_images(data / "another class", 1, seed=77)
    with pytest.raises(ValueError, match="has 'another class' among its 3 classes, which the checkpoint does not know"):
        evaluate(run, data)
    assert caplog.messages == []


def test_a_changed_folder_of_the_training_is_refused(tmp_path, caplog):
    data = write_classes(tmp_path / "pets", {"cat": 5, "dog": 5})
    train(TrainConfig(data=str(data), val_fraction=0, out_dir=str(tmp_path / "run"), **SETTINGS), quiet=True)
    write_images(data / "cat", 1, seed=99)
    with pytest.raises(DataError, match=r"`data` .* does not hold the files that the weights were trained on, so that"):
        evaluate(tmp_path / "run")
    moved = data.rename(tmp_path / "moved")
    assert evaluate(tmp_path / "run", moved).num_images == 11
    assert "which the weights were trained on, cannot be read" in caplog.text


def test_weights_of_other_data_are_tested_on_all_images(tmp_path):
    data = write_image_folder(tmp_path / "pets", num_images=3)
    train(TrainConfig(data=str(data), val_fraction=0, out_dir=str(tmp_path / "run"), **SETTINGS), quiet=True)
    assert evaluate(tmp_path / "run", data / "val").num_images == 9
    assert evaluate(tmp_path / "run").num_images == 9


def test_the_heading_shows_the_division(finished, tmp_path):
    job = new_job(TrainConfig(data=str(finished[1]), seed=3, **SETTINGS))
    lines = dict(job.heading())
    assert lines["data"] == "fünf $^{$ Tiere, 3 classes, images of 3x16x16: 21 train, 3 validate, 6 test"
    assert lines["test set"] == "6 images, a fifth of each class, chosen by seed 3 and the names of the files"
    assert lines["epochs"] == "1, 2 updates of 8 images; each epoch leaves out 5 of 21, others each time"


@pytest.mark.parametrize(
    ("settings", "lr"),
    [
        ({}, 0.02 * 8 / 32),
        ({"batch_size": 16}, 0.01),
        ({"lr": 0.3}, 0.3),
        ({"optimizer": "adamw"}, 1e-3),
        ({"data": "digits", "model": "revnet38", "batch_size": 100}, 0.1),
        ({"data": "digits", "model": "revnet38", "optimizer": "adamw"}, 1e-3),
    ],
)
def test_the_default_rate_suits_the_data(finished, settings, lr):
    settings = SETTINGS | {"data": str(finished[1])} | settings
    if settings["data"] == "digits":
        del settings["image_size"]
    assert new_job(TrainConfig(**settings)).config.lr == lr


@pytest.mark.parametrize(
    ("counts", "settings", "message"),
    [
        (
            {"cat": 9},
            {},
            r"`data` \(='.*'\) has a single class, 'cat', and a classifier needs two or more; add a folder",
        ),
        (
            {"cat": 2, "dog": 9},
            {},
            r"`val_fraction` \(=0.1\) holds .*, and the class 'cat' has a single training image",
        ),
        (
            {"cat": 3, "dog": 3},
            {},
            r"`val_fraction` \(=0.1\) holds out 1 image of 4, fewer than the 2 classes; pass 0.5",
        ),
        ({"cat": 3, "dog": 3}, {"val_fraction": 0}, r"`batch_size` \(=8\) must not exceed the 4 .*; pass 4 or less"),
    ],
)
def test_too_few_classes_or_images(tmp_path, counts, settings, message):
    data = write_classes(tmp_path / "data", counts)
    with pytest.raises(ValueError, match=message) as caught:
        new_job(TrainConfig(data=str(data), **SETTINGS | settings))
    assert "\n" not in str(caught.value)
