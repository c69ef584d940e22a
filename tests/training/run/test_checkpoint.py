import errno
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from revnet.errors import CheckpointError
from revnet.training import load_classifier
from revnet.training.run.checkpoint import read_checkpoint, read_outline, save_weights
from revnet.training.run.checkpoint_io import AtomicCheckpointIO
from tests.training.samples import newest_checkpoint

CHECKPOINT = "checkpoints/update-00000024.ckpt"


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished.folder, tmp_path / "copy")


@pytest.fixture
def weights(folder):
    return folder / "last.safetensors"


def metadata(path):
    """Return the header of a file without its hash, which would reveal that a test has changed the file."""
    with safe_open(path, framework="pt") as file:
        return {name: text for name, text in file.metadata().items() if name != "hash"}


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_weights_round_trip_bit_for_bit(weights, tmp_path):
    classifier = load_classifier(weights)
    save_weights(classifier, tmp_path / "again.safetensors")
    again = load_classifier(tmp_path / "again.safetensors")
    assert_same_state(again.state_dict(), classifier.state_dict())
    assert again.header == classifier.header
    assert not again.training


def test_folder_weights_and_checkpoint_hold_the_same_weights(folder):
    paths = (folder, folder / "last.safetensors", newest_checkpoint(folder))
    states = [load_classifier(path).state_dict() for path in paths]
    assert_same_state(states[0], states[1])
    assert_same_state(states[0], states[2])


def test_folder_without_weights_falls_back_to_the_checkpoint(folder):
    (folder / "last.safetensors").unlink()
    assert load_classifier(folder).header.model == "revnet38"


def test_header_describes_the_weights(weights):
    header = load_classifier(weights).header
    assert (header.model, header.data, header.preprocess) == ("revnet38", "digits", "standardize")
    assert (header.class_names, header.image_shape) == (tuple("0123456789"), (1, 8, 8))
    assert (header.num_classes, header.in_channels) == (10, 1)


def test_weights_have_ordinary_permissions(weights):
    assert weights.stat().st_mode & 0o777 == (weights.parent / "config.yaml").stat().st_mode & 0o777


def assert_refused(path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_classifier(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["last.safetensors", CHECKPOINT])
@pytest.mark.parametrize("num_bytes", [0, 3, 1000, 5000, 500_000])
def test_rejects_a_truncated_file(folder, name, num_bytes):
    path = folder / name
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert_refused(path, rf"{name}` is truncated or not a .* file|{name}` is truncated or not a PyTorch checkpoint")


@pytest.mark.parametrize("name", ["last.safetensors", CHECKPOINT])
def test_rejects_a_file_in_another_format(folder, name):
    (folder / name).write_text("hello\n")
    assert_refused(folder / name, "is truncated or not a")


def test_rejects_a_missing_file(tmp_path):
    assert_refused(tmp_path / "last.ckpt", "does not exist; pass a `.safetensors` or `.ckpt` file")
    assert_refused(tmp_path, "holds no last.safetensors and no checkpoint")


def test_rejects_weights_of_another_program(weights):
    save_file(load_file(weights), weights)
    assert_refused(weights, "was not written by `revnet train`")


def test_rejects_a_checkpoint_of_another_program(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert_refused(tmp_path / "other.ckpt", "was not written by `revnet train`")


def test_does_not_execute_code_in_a_checkpoint(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pickled.ckpt")
    assert_refused(tmp_path / "pickled.ckpt", "is truncated or not a PyTorch checkpoint")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet32", "does not fit the model resnet32: .*; pass a checkpoint of that model"),
        ("revnet83", "cannot be rebuilt: .*'revnet83'"),
    ],
)
def test_rejects_weights_of_another_model(weights, model, message):
    save_file(load_file(weights), weights, metadata(weights) | {"model": model})
    assert_refused(weights, message)


def test_rejects_another_shape_and_names_both(weights):
    tensors = load_file(weights)
    tensors["model.head.bias"] = torch.zeros(7)
    save_file(tensors, weights, metadata(weights))
    assert_refused(weights, r"`model.head.bias` is \(7,\) in the file and \(10,\) in the model")


def test_rejects_a_missing_tensor(weights):
    tensors = load_file(weights)
    del tensors["model.head.bias"]
    save_file(tensors, weights, metadata(weights))
    assert_refused(weights, "does not fit the model revnet38: it lacks the tensor `model.head.bias`")


def test_rejects_a_superfluous_tensor(weights):
    save_file(load_file(weights) | {"model.tail": torch.zeros(1)}, weights, metadata(weights))
    assert_refused(weights, "the model has no tensor `model.tail`")


def test_rejects_weights_without_preprocessing(weights):
    tensors = load_file(weights)
    del tensors["preprocess.mean"]
    save_file(tensors, weights, metadata(weights))
    assert_refused(weights, "lacks the tensors of its preprocessing")


def test_rejects_a_later_format(weights):
    save_file(load_file(weights), weights, metadata(weights) | {"format": "2", "revnet_version": "9.0"})
    assert_refused(weights, "has format 2 of revnet 9.0, this is revnet .*; update revnet")


@pytest.mark.parametrize("name", ["format", "revnet_version", "kind"])
def test_long_texts_in_a_header_are_shortened(weights, name):
    save_file(load_file(weights), weights, metadata(weights) | {"format": "2", name: "9" * 2000})
    with pytest.raises(CheckpointError, match=r"9\.\.\.|has format 2") as caught:
        load_classifier(weights)
    assert len(str(caught.value)) < 200 + len(str(weights))


def test_reads_files_whose_path_is_not_utf8(folder):
    folder = folder.rename(folder.parent / os.fsdecode(b"caf\xe9"))
    for path in (folder, newest_checkpoint(folder)):
        assert load_classifier(path).header.model == "revnet38"
    assert "epoch" in read_outline(newest_checkpoint(folder))


@pytest.mark.parametrize("is_async", [False, True])
def test_checkpoint_is_written_atomically(folder, monkeypatch, is_async):
    path = newest_checkpoint(folder)
    before = path.read_bytes()

    def write_half(checkpoint, file):
        file.write(before[: len(before) // 2])
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(torch, "save", write_half)
    writer = AtomicCheckpointIO(is_async=is_async)
    writer.save_checkpoint({}, path)
    writer.teardown()
    assert writer.take_error().errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert read_checkpoint(path)["epoch"] == 1
