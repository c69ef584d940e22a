"""timm's own training script, which its wheel does not contain: reversed and stored, the same losses.

Set TIMM_TRAIN to the path of `train.py` from timm's repository.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("timm", reason="timm is not installed")

ROOT = Path(__file__).parent.parent.parent
SCRIPT = os.environ.get("TIMM_TRAIN")
EXACT = """
from timm.models import create_model, register_model

import revnet
import revnet.timm


@register_model
def exact_revnet38(pretrained=False, **kwargs):
    model = create_model("revnet38", **kwargs)
    revnet.set_coupling(model, revnet.FixedPoint())
    return model
"""
"""A module of a user, with a network whose rebuilt activations are exact."""


def write_images(folder):
    for split in ("train", "validation"):
        for label in range(2):
            for index in range(8):
                path = folder / split / str(label) / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (100 * label, 20 * index, 50)).save(path)


def train(folder, name, *options):
    """Return what the script writes about each epoch."""
    settings = "--img-size 32 --num-classes 2 --batch-size 8 --epochs 2 --opt adamw --lr 1e-3 --layer-decay 0.9"
    more = "--workers 1 --device cpu --mixup 0.5 --model-ema --output runs --experiment"
    paths = [str(ROOT / "src"), str(folder), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, SCRIPT, "--data-dir", "images", *settings.split(), *more.split(), name, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return (folder / "runs" / name / "summary.csv").read_text()


@pytest.mark.slow
@pytest.mark.skipif(SCRIPT is None, reason="TIMM_TRAIN does not name timm's train.py")
def test_reversed_and_stored_have_the_same_losses(tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "exact_models.py").write_text(EXACT)
    model = ["--device-modules", "exact_models", "--model", "exact_revnet38"]
    reversed_losses = train(tmp_path, "reverse", *model, "--grad-checkpointing")
    assert len(reversed_losses.splitlines()) == 3
    assert train(tmp_path, "store", *model, "--model-kwargs", "policy=store") == reversed_losses


@pytest.mark.slow
@pytest.mark.skipif(SCRIPT is None, reason="TIMM_TRAIN does not name timm's train.py")
def test_the_command_of_the_docs(tmp_path):
    write_images(tmp_path / "images")
    options = "--device-modules revnet.timm --model revnet56"
    assert options in (ROOT / "docs" / "timm.md").read_text()
    assert "train_loss" in train(tmp_path, "docs", *options.split())
