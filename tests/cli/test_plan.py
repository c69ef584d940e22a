"""`revnet plan`: its flags, plan and picture. tests/memory tests the plans."""

import sys

import pytest
import torch

from revnet import memory
from revnet.cli._model import build_model
from revnet.memory import format_bytes, predict
from revnet.nn import Checkpoint

SMALL = ["--batch", "4"]
IMAGES = torch.empty(4, 3, 32, 32, device="meta")

OWN = """
import torch
from torch import nn
from revnet import PolicySequential, ReversibleBlock, ReversibleSequential

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = PolicySequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        blocks = [ReversibleBlock(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(2)]
        self.blocks = ReversibleSequential(*blocks)

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((2, 3))

def tokens():
    return nn.Sequential(nn.Embedding(10, 4), ReversibleSequential(ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2),
                                                                                   split_dim=-1)))
def wide():
    return ReversibleSequential(*[ReversibleBlock(nn.Linear(128, 128), nn.Linear(128, 128)) for _ in range(2)])

def with_data():
    net = Net()
    float(next(net.parameters()).detach().sum())  # which the meta device does not have
    return net

def broken():
    raise RuntimeError("no such weights")

def branching():
    class Branching(Net):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)
    return Branching()

model = Net()
number = 3
"""


@pytest.fixture(autouse=True)
def _in_a_folder_with_own_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_networks.py").write_text(OWN)
    (tmp_path / "own_imports.py").write_text("import no_such_package")


def test_prints_and_plots_a_plan(revnet, tmp_path):
    pytest.importorskip("matplotlib")
    code, output, errors = revnet("plan", "revnet38", *SMALL, "--budget", "10MiB", "--out-dir", "pictures")
    assert (code, errors) == (0, "")
    assert output.startswith("revnet38: a training step on 4 inputs of 3x32x32, SGD with momentum, 32-true, cpu\n\n")
    for words in ("budget     10.0 MiB", "units ", "stages.2.reversible.blocks", "plain autograd", "least memory"):
        assert words in output
    assert "picture    pictures/plan_revnet38_batch4.png\n" in output
    assert (tmp_path / "pictures" / "plan_revnet38_batch4.png").exists()
    assert 'in Python  revnet.memory.plan(model, inputs, budget="10MiB", optimizer=partial(torch.optim.SGD' in output
    assert (
        "to train   revnet train --model revnet38 --data path/to/images --batch-size 4 --memory-budget 10MiB" in output
    )


def test_suggested_train_command_has_the_optimizer(revnet, monkeypatch):
    small = memory.plan(build_model("own_networks:Net", is_real=False), IMAGES, budget="1MiB")
    monkeypatch.setattr(memory, "plan", lambda *_, **options: small)  # The plan itself does not matter here.
    for optimizer in ("adamw", "adam"):
        output = revnet("plan", "revnet38", *SMALL, "--budget", "12MiB", "--optimizer", optimizer)[1]
        assert f"--batch-size 4 --optimizer {optimizer} --lr 0.001 --memory-budget 12MiB" in output
    assert "to train" not in revnet("plan", "revnet38", *SMALL, "--budget", "12MiB", "--optimizer", "none")[1]


def test_printed_python_code_makes_the_same_plan(revnet):
    output = revnet("plan", "own_networks:Net", *SMALL, "--budget", "600KiB", "--image", "32")[1]
    call = next(line for line in output.splitlines() if line.startswith("in Python")).split(maxsplit=2)[2]
    import functools

    import revnet as library

    model = build_model("own_networks:Net", is_real=False)
    names = {"revnet": library, "partial": functools.partial, "torch": torch, "model": model}
    eval(call, {**names, "inputs": IMAGES})
    assert model.stem.policies == (Checkpoint(),), "without a plan, the model stores"
    optimizer = functools.partial(torch.optim.SGD, momentum=0.9)
    peak = predict(model, IMAGES, optimizer=optimizer).peak_bytes
    assert peak <= 600 * 2**10
    assert f"peak       {format_bytes(peak)}" in output


def test_moves_the_step_into_the_backward_pass_if_nothing_else_fits(revnet):
    arguments = ["plan", "own_networks:wide", "--input-shape", "[256]", *SMALL, "--step-in-backward", "--budget"]
    output = revnet(*arguments, "700KiB")[1]
    assert "\noptimizer  StepInBackward  its step runs in the backward pass\n" in output
    assert "step_in_backward=True).apply(model)\n           revnet.optim.StepInBackward(optimizer)\n" in output
    assert "StepInBackward" not in revnet(*arguments, "1GiB")[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["own_networks:Net", "--image", "16"],
        ["own_networks:model", "--image", "16"],
        ["own_networks:with_data", "--image", "16", "--optimizer", "adamw", "--precision", "bf16-mixed"],
        ["own_networks:tokens", "--input-shape", "[7]", "--input-dtype", "int64", "--optimizer", "none"],
        ["own_networks:Net", "--image", "16", "--measure"],
    ],
)
def test_models_of_the_user(revnet, arguments):
    code, output, errors = revnet("plan", *arguments, *SMALL, "--budget", "1GiB")
    assert (code, errors) == (0, "")
    assert f"{arguments[0]}: a training step on 4 inputs of" in output
    assert ("timed" in output) == ("--measure" in arguments)
    assert "to train" not in output  # `revnet train` knows none but its own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["revnet38"], "`--budget` is required"),
        (["revnet38", "--budget", "16 apples"], "`--budget` (='16 apples') must be a number of bytes with a unit"),
        (["own_networks:Net", "--budget", "50KiB", "--image", "16"], "below the least that this step needs"),
        (["own_networks:Net", "--budget", "1KiB", "--image", "16"], "no batch would fit"),
        (["revnet83", "--budget", "1GiB"], "unknown model `revnet83`; did you mean `revnet38`?"),
        (["revnet38", "--budget", "1GiB", "--batch", "0"], "`--batch` (=0) must be"),
        (["revnet38", "--budget", "1GiB", "--batch", "1000000000"], "`--batch` (=1000000000) must be 1000000 or less"),
        (["revnet38", "--budget", "1GiB", "--image", "-3"], "`--image` (=-3) must be"),
        (
            ["own_networks:Net", "--budget", "1GiB", "--input-shape", "[0]"],
            "`--input-shape` (=[0]) must hold positive",
        ),
        (["own_networks:Net", "--budget", "1GiB", "--input-shape", "[2000000000000,8000000]"], "a step can count"),
        (["own_networks:Net", "--budget", "1GiB", "--input-shape", "[3]", "--image", "3"], "leave one of the two out"),
        (["revnet38", "--budget", "1GiB", "--input-shape", "[3]"], "`--input-shape` is for models of your own"),
        (["revnet38", "--budget", "1GiB", "--device", "gpu"], "`--device` (='gpu') is not a device"),
        (["own_networks.py:Net", "--budget", "1GiB"], "must be written package.module:attribute"),
        (["no_such:Net", "--budget", "1GiB"], "no module `no_such` is installed"),
        (
            ["own_imports:Net", "--budget", "1GiB"],
            "importing `own_imports` failed: ModuleNotFoundError: No module named",
        ),
        (["own_networks:Nett", "--budget", "1GiB"], "has no `Nett`; did you mean `Net`?"),
        (
            ["own_networks:number", "--budget", "1GiB"],
            "must be an nn.Module, or a callable that returns one; got int",
        ),
        (["own_networks:broken", "--budget", "1GiB"], "failed when called without arguments: RuntimeError: no"),
        (["own_networks:branching", "--budget", "1GiB", "--image", "8"], "asks for the value of a tensor"),
        (
            ["own_networks:Net", "--budget", "1GiB", "--input-shape", "[4,8,8]"],
            "failed, on inputs of shape (32, 4, 8, 8)",
        ),
    ],
)
def test_usage_errors_print_one_line(assert_refused, arguments, message):
    assert_refused(["plan", *arguments], message)


def test_prints_the_plan_without_matplotlib(revnet, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, output, errors = revnet("plan", "own_networks:Net", *SMALL, "--image", "8", "--budget", "1GiB")
    assert (code, errors) == (0, "")
    assert "least memory" in output
    assert "no picture: a figure needs matplotlib, which is not installed" in output
    assert not list(tmp_path.glob("*.png"))


def test_does_not_run_a_step_that_exceeds_free_memory(assert_refused, monkeypatch):
    monkeypatch.setattr("revnet.cli._build.free_bytes", lambda device: 1000)
    arguments = ["own_networks:Net", *SMALL, "--image", "8", "--budget", "1GiB", "--measure"]
    assert_refused(["plan", *arguments], "on cpu, where 1000 B are free; leave it out, or pass a smaller `--batch`")


def test_help_has_an_example(revnet):
    assert "revnet plan revnet104 --batch 256 --budget 16GiB" in revnet("plan", "--help")[1]
