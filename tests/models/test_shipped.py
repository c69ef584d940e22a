"""Trained weights that come with the package."""

import re
import shutil

import pytest
import torch
from safetensors import safe_open

from revnet import create_model
from revnet.data.sources.digits import load_digits
from revnet.errors import CheckpointError
from revnet.models import from_pretrained, list_pretrained
from revnet.models.pretrained import shipped
from revnet.models.pretrained.shipped import find_pretrained, results_folder
from revnet.training import load_classifier

MOST_BYTES = 15e6
DIGITS = "revnet38.digits"


def test_every_network_has_its_files_and_a_card():
    folders = [find_pretrained(name) for name in list_pretrained()]
    for folder in folders:
        card = (folder / "README.md").read_text()
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert f"Hash of the weights: {file.metadata()['hash']}\n" in card
        assert re.search(r"^seed: \d+$", card, re.MULTILINE)
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < MOST_BYTES


@pytest.mark.parametrize("name", list_pretrained())
def test_every_network_is_built(name):
    model = from_pretrained(name)
    assert not model.training
    assert find_pretrained(name).name == name


def test_accuracy_is_the_one_of_the_card():
    model = create_model(DIGITS, pretrained=True)
    test = load_digits().test
    card = (find_pretrained(DIGITS) / "README.md").read_text()
    classifier = load_classifier(DIGITS)
    with torch.no_grad():
        correct = (classifier(test.images).argmax(1) == test.labels).float().mean().item()
    assert f"{100 * correct:.2f}" in card
    assert torch.equal(classifier.model.head.weight, model.head.weight)


def test_options_of_the_model():
    model = create_model(DIGITS, pretrained=True, num_classes=3, policy="store")
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    trained = create_model(DIGITS, pretrained=True)
    assert torch.equal(
        model.stages[0].reversible.blocks[0].f.conv1.weight, trained.stages[0].reversible.blocks[0].f.conv1.weight
    )
    with pytest.raises(
        ValueError, match=r"`in_channels` \(=3\) must be 1, as in the trained weights of 'revnet38.digits'"
    ):
        create_model(DIGITS, pretrained=True, in_channels=3)


def test_a_name_that_has_no_weights():
    with pytest.raises(ValueError, match=r"`pretrained` \(=True\) .* none for `name` \(='resnet110'\)"):
        create_model("resnet110", pretrained=True)
    with pytest.raises(ValueError, match=r"`name` \(='revnet38.digits'\) is the name of trained weights; pass `pretr"):
        create_model(DIGITS)
    with pytest.raises(TypeError, match=r"`pretrained` \(='yes'\)"):
        create_model(DIGITS, pretrained="yes")


@pytest.mark.parametrize("name", ["owner/name", "hub:owner/name"])
def test_names_on_the_hub_lead_to_from_pretrained(name):
    with pytest.raises(ValueError, match=r"a network of this package .* call `revnet.models.from_pr"):
        create_model(name, pretrained=True)


@pytest.mark.parametrize("damage", ["tensors", "header"])
def test_damaged_files_of_the_package_lead_to_an_installation(tmp_path, monkeypatch, damage):
    folder = shutil.copytree(find_pretrained(DIGITS), tmp_path / DIGITS)
    monkeypatch.setattr(shipped, "_PACKAGED", tmp_path)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1 if damage == "tensors" else 20] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"(damaged: its content has changed|truncated).*; it belongs to the package"
    ):
        create_model(DIGITS, pretrained=True)


def test_a_folder_of_ones_own_comes_first(tmp_path, monkeypatch):
    own = tmp_path / "revnet38.mine"
    shutil.copytree(find_pretrained(DIGITS), own)
    monkeypatch.setenv("REVNET_WEIGHTS", str(tmp_path))
    assert "revnet38.mine" in list_pretrained()
    assert create_model("revnet38.mine", pretrained=True).num_classes == 10


@pytest.mark.parametrize("call", [list_pretrained, lambda: find_pretrained(DIGITS)])
def test_a_folder_of_ones_own_that_is_missing(tmp_path, monkeypatch, call):
    monkeypatch.setenv("REVNET_WEIGHTS", str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"`REVNET_WEIGHTS` must name a folder .* `.*missing` is not"):
        call()


def test_damaged_weights_are_refused(tmp_path, monkeypatch):
    own = tmp_path / DIGITS
    shutil.copytree(find_pretrained(DIGITS), own)
    data = bytearray((own / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (own / "model.safetensors").write_bytes(data)
    monkeypatch.setenv("REVNET_WEIGHTS", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"model.safetensors` is damaged"):
        create_model(DIGITS, pretrained=True)


def test_results_do_not_go_into_the_package():
    assert str(results_folder(find_pretrained(DIGITS) / "model.safetensors")) == "."


def test_a_path_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / DIGITS).mkdir()
    assert find_pretrained(DIGITS) is None
    with pytest.raises(CheckpointError, match="holds no model"):
        from_pretrained(DIGITS)
