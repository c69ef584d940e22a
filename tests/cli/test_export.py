import importlib.util
import io
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch

from revnet.training import load_classifier, push
from revnet.training.run.checkpoint import save_weights
from tests.models.hub_server import serve
from tests.training.samples import make_header, save_checkpoint


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the working folder, which holds a run."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "run" / "last.safetensors", make_header(image_shape=(1, 8, 8)))
    return tmp_path


def test_writes_next_to_the_weights(revnet, folder):
    code, output, errors = revnet("export", "run", "--format", "pt2")
    assert (code, errors) == (0, "")
    assert output.splitlines() == [
        "weights: run/last.safetensors",
        "run/last.pt2: torch.export.load equals PyTorch up to 0.0e+00 at batch sizes 1 and 7",
    ]
    assert (folder / "run" / "last.pt2").stat().st_size > 0


def test_writes_a_model_on_the_hub_to_the_current_folder(revnet, folder, monkeypatch):
    push("run", "owner/name", dry_run="pushed")
    with serve(monkeypatch, folder / "cache") as hub:
        hub.add("owner/name", folder / "pushed")
        code, output, _ = revnet("export", "hub:owner/name", "--format", "pt2")
    assert code == 0
    assert "\nmodel.pt2: torch.export.load equals PyTorch" in output
    assert (folder / "model.pt2").exists()


def test_writes_a_network_of_the_package_to_the_current_folder(assert_refused, folder):
    (folder / "revnet38.digits.pt2").write_text("mine")
    message = "`--out` (=revnet38.digits.pt2) exists, and this command did not write it"
    assert_refused(("export", "revnet38.digits", "--format", "pt2"), message)


def test_names_the_missing_package(assert_refused, folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "revnet.training.export.write.find_spec", lambda name: None if name == "onnxruntime" else find("torch")
    )
    assert_refused(("export", "run"), "needs onnxruntime, which is not installed; run `pip install -e '")
    assert_refused(("export", "run", "--format", "onnx"), "[export]'`")
    assert not (folder / "run" / "last.onnx").exists()


def test_streams_on_a_grid_cannot_be_onnx(assert_refused, folder):
    save_checkpoint(folder / "exact.safetensors", make_header(model="revnet38", is_exact=True))
    assert_refused(("export", "exact.safetensors"), "`--format` (=onnx) is not for streams on a fixed-point grid")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing",), "`missing` does not exist"),
        (("run", "--format", "torchscript"), "`--format` (=torchscript) must be `onnx` or `pt2`"),
        (
            ("run", "--out", "nowhere/model.onnx"),
            "`--out` (=nowhere/model.onnx) must be a file in a folder that exists",
        ),
        (("run", "--out", "run"), "`--out` (=run) must be a file in a folder that exists"),
        (
            ("run", "--out", "run/last.safetensors"),
            "is the name of an image or of weights, which the file would replace",
        ),
    ],
)
def test_refuses(assert_refused, folder, arguments, message):
    assert_refused(("export", *arguments), message)
    assert [file.name for file in (folder / "run").iterdir()] == ["last.safetensors"]


def test_refuses_a_model_of_the_users_own(assert_refused, folder):
    classifier = load_classifier(folder / "run")
    classifier.header = replace(classifier.header, model="package.module:network")
    save_weights(classifier, folder / "own.safetensors")
    assert_refused(("export", "own.safetensors"), "its model package.module:network is your own code")


def test_lines_do_not_mix_with_a_file_on_standard_output(folder):
    command = [sys.executable, "-m", "revnet", "export", "run", "--format", "pt2", "--out", "/dev/stdout"]
    result = subprocess.run(command, check=True, capture_output=True)
    assert zipfile.is_zipfile(io.BytesIO(result.stdout))
    assert result.stdout.startswith(b"PK")
    assert b"equals PyTorch" not in result.stdout
    assert b"equals PyTorch" in result.stderr


def test_replaces_only_models(revnet, assert_refused, folder):
    (folder / "notes.txt").write_text("my notes")
    assert_refused(
        ("export", "run", "--format", "pt2", "--out", "notes.txt"),
        "`--out` (=notes.txt) exists, and this command did not write it; pass another name, or delete the file.",
    )
    with zipfile.ZipFile(folder / "notes.zip", "w") as archive:
        archive.writestr("notes.txt", "my notes")
    assert_refused(("export", "run", "--format", "pt2", "--out", "notes.zip"), "exists, and this command did not write")
    assert_refused(("export", "run", "--out", "photo.png"), "is the name of an image or of weights, which the file")
    assert (folder / "notes.txt").read_text() == "my notes"
    for _ in range(2):
        assert revnet("export", "run", "--format", "pt2", "--out", "model.pt2")[0] == 0
