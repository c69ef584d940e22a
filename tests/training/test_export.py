"""Files for inference: the model of a run, written for programs without revnet."""

import errno
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from revnet.training.density.model import DensityHeader, ImageDensity
from revnet.training.export import write
from revnet.training.export.inference import read_inference
from revnet.training.export.write import write_inference
from revnet.training.language.model import LanguageHeader, LanguageModel
from revnet.training.run.checkpoint import save_weights
from tests.training.samples import make_header, save_checkpoint

# This program cannot import revnet, like a server without it.
LOAD = """
import sys, torch
sys.modules["revnet"] = None
for name in sys.argv[1:]:
    x, y = torch.load(f"{name}.pt")
    module = torch.export.load(f"{name}.pt2").module()
    for _ in range(2):
        assert torch.equal(module(x), y), name
"""


def perturbed(module):
    """Give the last layers, which start at zero, some weights."""
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return module


def language_model(documents=None, **options):
    options = {"dim": 8, "depth": 2, "num_heads": 2, "max_length": 16} | options
    characters = "abcdef" if documents is None else "\0abcde"
    header = LanguageHeader(data="book.txt", characters=characters, documents=documents, options=options)
    return perturbed(LanguageModel.create(header))


def density(model, **options):
    header = DensityHeader(model=model, data="digits", image_shape=(1, 4, 4), num_levels=17, options=options)
    return perturbed(ImageDensity.create(header))


MODULES = {
    "language model": language_model,
    "documents": lambda: language_model(documents="separate"),
    "hierarchical attention": lambda: language_model(attention="hierarchical", block_size=4),
    "nice": lambda: density("nice", hidden_dim=4, num_hidden=1, num_couplings=2),
    "realnvp": lambda: density("realnvp", num_scales=1, hidden_dim=4),
    "glow": lambda: density("glow", num_scales=1, num_steps=1, hidden_dim=4),
}
ON_GRID = {"lsh attention": lambda: language_model(attention="lsh", bucket_size=2, num_hashes=1, depth=1)}
"""Modules whose streams are rounded, which ONNX files cannot hold."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return the files of weights of all families."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    files = {"classifier": save_checkpoint(folder / "classifier.safetensors", make_header(image_shape=(3, 8, 8)))}
    for name, make in (MODULES | ON_GRID).items():
        files[name] = folder / f"{name}.safetensors"
        save_weights(make(), files[name])
    return files


QUICK = ["language model", "nice"]
OTHERS = [name for name in (*MODULES, *ON_GRID) if name not in QUICK]


@pytest.mark.parametrize("chosen", [QUICK, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["quick", "others"])
def test_every_family_runs_without_revnet(chosen, weights, tmp_path):
    names = []
    for name in chosen:
        inference = read_inference(weights[name])
        report = write_inference(inference, tmp_path / f"{name}.pt2", "pt2")
        assert report.difference == 0
        assert str(report).endswith("torch.export.load equals PyTorch up to 0.0e+00 at batch sizes 1 and 7")
        x = inference.draw_input(3, torch.Generator().manual_seed(0))
        torch.save((x, inference.module(x)), tmp_path / f"{name}.pt")
        names.append(str(tmp_path / name))
    subprocess.run([sys.executable, "-c", LOAD, *names], check=True, capture_output=True)


def test_metadata_and_no_paths(weights, tmp_path):
    write_inference(read_inference(weights["classifier"]), tmp_path / "model.pt2", "pt2")
    extra = {"revnet.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    metadata = json.loads(extra["revnet.json"])
    assert json.loads(metadata["labels"]) == ["cat", "dog", "frog"]
    assert json.loads(metadata["image_shape"]) == [3, 8, 8]
    assert (json.loads(metadata["mean"]), json.loads(metadata["std"])) == ([128.0] * 3, [64.0] * 3)
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        for name in archive.namelist():
            assert ".tmp" not in name
            assert str(tmp_path).encode() not in archive.read(name)
            assert __file__.encode() not in archive.read(name)


def test_resized_images_are_described(tmp_path):
    file = save_checkpoint(tmp_path / "last.safetensors", make_header(is_resized=True))
    assert "height / 0.875" in read_inference(file).metadata["resize"]


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_file_that_differs_is_not_written(weights, tmp_path, monkeypatch, format):
    monkeypatch.setattr(write, "_compare", lambda *arguments: float("nan"))
    monkeypatch.setattr(write, "_write_onnx", lambda inference, path: path.touch())
    monkeypatch.setattr(write, "_open_onnx", lambda inference, path: None)
    monkeypatch.setattr(write, "find_spec", lambda package: True)
    path = tmp_path / f"model.{format}"
    path.write_text("an earlier file")
    with pytest.raises(ValueError, match=r"differ from PyTorch by nan, more than 1e-05, so no file was written"):
        write_inference(read_inference(weights["nice"]), path, format)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "an earlier file"


def test_compares_at_both_batch_sizes(weights):
    inference = read_inference(weights["nice"])
    differences = [write._compare(inference, lambda x: inference.module(x) + len(x), batch) for batch in (1, 7)]
    assert differences[0] > write.TOLERANCE < differences[1]
    assert write._compare(inference, lambda x: inference.module(x[:1]), 7) == float("inf")


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_place_that_cannot_be_written_to_is_an_error_before_the_work(weights, monkeypatch, format):
    if format == "onnx":
        pytest.importorskip("onnx")
    monkeypatch.setattr(write, f"_write_{format}", lambda inference, path: pytest.fail("It has begun."))
    with pytest.raises(OSError, match="'/proc/m'"):
        write_inference(read_inference(weights["nice"]), Path("/proc/m"), format)


def test_a_full_disk_is_not_blamed_on_the_format(weights, monkeypatch, tmp_path):
    def fail(inference, path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("cannot write") from error

    monkeypatch.setattr(write, "_write_pt2", fail)
    with pytest.raises(OSError, match=r"No space left on device: .*m\.pt2"):
        write_inference(read_inference(weights["nice"]), tmp_path / "m.pt2", "pt2")
    assert not list(tmp_path.iterdir())


def test_what_pytorch_cannot_write_is_one_line(weights, tmp_path):
    class Branching(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    inference = replace(read_inference(weights["nice"]), module=Branching())
    with pytest.raises(NotImplementedError, match=r"`format` \(=pt2\) cannot hold this model, says PyTorch: ") as error:
        write_inference(inference, tmp_path / "model.pt2", "pt2")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
