import pytest
import torch
from safetensors.torch import save

from revnet.errors import CheckpointError
from revnet.training import load_classifier
from revnet.training.run.checkpoint import find_weights, save_weights
from revnet.training.run.used_weights import describe_weights
from tests.training.samples import make_header, save_checkpoint


@pytest.fixture
def run(tmp_path):
    """Return the folder of a run whose best epoch is 2 and whose last is 5."""
    classifier = load_classifier(save_checkpoint(tmp_path / "a.safetensors", make_header()))
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name, epoch in (("best", 2), ("last", 5)):
        save_weights(classifier, folder / f"{name}.safetensors", epoch=epoch)
    return folder


def test_names_the_file_and_its_epoch(run):
    assert describe_weights(run) == f"{run / 'last.safetensors'} (epoch 5)"
    assert describe_weights(run / "best.safetensors") == f"{run / 'best.safetensors'} (epoch 2)"
    assert find_weights(run) == run / "last.safetensors"
    load_classifier(run)  # the epoch is not a part of the header


def test_an_epoch_from_outside_is_short_and_printable(tmp_path):
    path = tmp_path / "odd.safetensors"
    for epoch, shown in (("1" * 5000, "1" * 17 + "..."), ("\x1b[2J", r"\x1b[2J")):
        path.write_bytes(save({"x": torch.zeros(1)}, {"epoch": epoch}))
        assert describe_weights(path) == f"{path} (epoch {shown})"


def test_names_the_file_alone_without_an_epoch(run, tmp_path):
    """Older files do not say their epoch, and the name of a checkpoint says its update."""
    assert describe_weights(tmp_path / "a.safetensors") == str(tmp_path / "a.safetensors")
    (run / "last.safetensors").unlink()
    checkpoint = run / "checkpoints" / "update-00000003.ckpt"
    checkpoint.write_bytes(b"")
    assert describe_weights(run) == str(checkpoint)
    (run / "best.safetensors").write_bytes(b"damaged")
    assert describe_weights(run / "best.safetensors") == str(run / "best.safetensors")


def test_rejects_a_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no last\.safetensors and no checkpoint"):
        describe_weights(tmp_path)
