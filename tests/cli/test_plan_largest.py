"""`revnet plan --largest`, and models with several inputs."""

import re
from functools import partial

import pytest
import torch

from revnet.cli._model import build_model
from revnet.memory import max_batch_size, parse_bytes, predict
from revnet.models import UNet3d
from revnet.nn import Checkpoint, Reverse, Store, set_policy

OWN = """
from torch import nn
from revnet import ReversibleBlock, ReversibleSequential
from revnet.models import UNet3d

def unet():
    return UNet3d(in_channels=1, num_classes=2, widths=(4, 8))

def plain():
    return nn.Conv2d(3, 4, 3, padding=1)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = ReversibleSequential(ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2), split_dim=-1))

    def forward(self, x, tokens):
        return self.blocks(x + self.embed(tokens))
"""
TWO = ["own_volumes:Two", "--input-shape", "[[5,4],[5]]", "--input-dtype", "[float32,int64]", "--batch", "3"]
UNET = ["own_volumes:unet", "--batch", "1", "--largest", "patch"]


@pytest.fixture(autouse=True)
def _in_a_folder_with_own_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_volumes.py").write_text(OWN)


def sizes_in(output):
    """Return the size in each row of the table, and its peak."""
    rows = re.findall(r"^(reverse all|checkpoint all|plain autograd|as built) +(\S+) +(\S+ \w+)$", output, re.MULTILINE)
    return {name: (size, peak) for name, size, peak in rows}


def with_policies(model, *policies):
    for policy in policies:
        set_policy(model, policy)
    return model


def test_largest_batch(revnet):
    step = ["own_volumes:unet", "--input-shape", "[1,8,8,8]"]
    code, output, errors = revnet("plan", *step, "--largest", "batch", "--budget", "3MiB")
    assert (code, errors) == (0, "")
    assert output.startswith(
        "own_volumes:unet: the largest batch of a training step within 3.0 MiB, predicted\n"
        "inputs of 1x8x8x8, SGD with momentum, 32-true, cpu\n\n"
    )
    sizes = {name: int(size.replace(",", "")) for name, (size, _) in sizes_in(output).items()}
    assert list(sizes) == ["reverse all", "checkpoint all", "plain autograd"]
    assert sizes["reverse all"] > sizes["checkpoint all"] > sizes["plain autograd"] > 0
    model = with_policies(build_model("own_volumes:unet", is_real=False), Store())
    x = torch.empty(1, 1, 8, 8, 8, device="meta")
    optimizer = partial(torch.optim.SGD, momentum=0.9)
    assert sizes["plain autograd"] == max_batch_size(model, x, budget="3MiB", optimizer=optimizer)
    words = ["plan", step[0], "--batch", str(sizes["reverse all"]), "--budget", "3MiB", "--input-shape", "'[1,8,8,8]'"]
    assert output.splitlines()[-1].split()[3:] == words


def test_largest_patch(revnet):
    code, output, errors = revnet(
        "plan", *UNET, "--input-shape", "[1,16,16,16]", "--budget", "20MiB", "--optimizer", "none"
    )
    assert (code, errors) == (0, "")
    assert "batch 1, sides in steps of 2, no optimizer, 32-true, cpu\n" in output
    policies = {
        "reverse all": (Checkpoint(), Reverse()),
        "checkpoint all": (Checkpoint(),),
        "plain autograd": (Store(),),
    }
    sizes = sizes_in(output)
    assert list(sizes) == list(policies)
    for name, (cell, _) in sizes.items():
        side = int(cell.split("x")[0])
        assert cell == f"{side}x{side}x{side}"
        model = with_policies(UNet3d(in_channels=1, num_classes=2, widths=(4, 8)), *policies[name])
        peaks = [predict(model, torch.empty(1, 1, s, s, s, device="meta")).peak_bytes for s in (side, side + 2)]
        assert peaks[0] <= parse_bytes("20MiB") < peaks[1], name
    side = sizes["reverse all"][0].split("x")[0]
    assert f"--input-shape '[1,{side},{side},{side}]' --optimizer none" in output


@pytest.mark.slow  # tests/memory/planning/test_max_patch_size.py has them, too
def test_multiple_and_dims(revnet):
    shape = ["--input-shape", "[1,4,8,8]", "--dims", "[3,4]", "--multiple", "8"]
    output = revnet("plan", *UNET, *shape, "--budget", "5MiB")[1]
    depth, height, width = map(int, sizes_in(output)["plain autograd"][0].split("x"))
    assert (depth, height % 8, width) == (4, 0, height)
    assert "sides in steps of 8" in output


def test_largest_image_of_a_model_without_units(revnet):
    output = revnet("plan", "own_volumes:plain", "--largest", "image", "--batch", "2", "--budget", "10MiB")[1]
    assert list(sizes_in(output)) == ["as built"]
    size, _ = sizes_in(output)["as built"]
    command = f"revnet memory own_volumes:plain --batch 2 --image {size.split('x')[0]}\n"
    assert output.endswith(f"\n\nto see where the bytes are  {command}")


@pytest.mark.slow
def test_model_of_two_inputs(revnet):
    pytest.importorskip("matplotlib")
    code, output, errors = revnet("memory", *TWO, "--measure")
    assert (code, errors) == (0, "")
    assert "3 inputs of 5x4 and 5, SGD with momentum, 32-true, cpu, measured" in output
    code, output, errors = revnet("plan", *TWO, "--budget", "1MiB")
    assert (code, errors) == (0, "")
    assert "in Python  revnet.memory.plan(model, *inputs, budget=" in output
    assert "4.0" not in revnet("plan", *TWO, "--budget", "1MiB", "--largest", "batch")[2]
    output = revnet("plan", *TWO, "--budget", "1MiB", "--largest", "patch", "--dims", "[1]")[1]
    length = sizes_in(output)["reverse all"][0].split("x")[0]
    assert f"--input-shape '[[{length},4],[{length}]]' --input-dtype '[float32,int64]'" in output
    output = revnet("plan", *TWO, "--budget", "1MiB", "--devices", "3", "--strategy", "ddp")[1]
    assert "of 5x4 and 5" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["revnet38", "--largest", "batch"], "`--budget` is required"),
        (["revnet38", "--largest", "volume", "--budget", "1GiB"], "`--largest` (=volume) must be `batch` or `image`"),
        (["own_volumes:plain", "--largest", "batch", "--budget", "1KiB"], "`--budget` (=1.0 KiB) is too small for any"),
        (["revnet38", "--largest", "patch", "--budget", "1GiB"], "needs `--input-shape`, with any sides"),
        (["revnet38", "--largest", "image", "--image", "32", "--budget", "1GiB"], "leave one of the two out"),
        (["revnet38", "--largest", "batch", "--measure", "--budget", "1GiB"], "`--measure` does not go with"),
        (["revnet38", "--multiple", "4", "--budget", "1GiB"], "`--multiple` is for `--largest image`"),
        (["revnet38", "--largest", "image", "--multiple", "0", "--budget", "1GiB"], "`--multiple` (=0) must be"),
        (["revnet38", "--largest", "image", "--dims", "[2]", "--budget", "1GiB"], "`--dims` is for `--largest patch`"),
        ([*UNET, "--input-shape", "[8]", "--budget", "1GiB"], "`--input-shape` (=[8]) has no dimension 2"),
        ([*UNET, "--input-shape", "[1,8,8,8]", "--dims", "[0]", "--budget", "1GiB"], "`--dims` (=[0]) must be"),
        ([*UNET, "--input-shape", "[1,9,9,9]", "--multiple", "9", "--budget", "1GiB"], "multiples of 2"),
        ([*TWO, "--input-dtype", "[float32]", "--budget", "1GiB"], "`--input-dtype` (=[float32]) must be one type"),
        ([*TWO, "--input-shape", "[[0],[2]]", "--budget", "1GiB"], "`--input-shape` (=[[0], [2]]) must hold positive"),
    ],
)  # fmt: skip
def test_rejects_wrong_options(assert_refused, arguments, words):
    assert_refused(["plan", *arguments], words)
