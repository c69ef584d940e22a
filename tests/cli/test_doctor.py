"""`revnet doctor`: from a model or a checkpoint to a table, a verdict and a picture."""

import pytest

from tests.training.samples import make_header, save_checkpoint


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_model_by_name(revnet, tmp_path):
    pytest.importorskip("matplotlib")
    code, output, errors = revnet("doctor", "revnet38", "--batch", 2, "--image", 16, "--gradients")
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert lines[0] == "revnet38: a training step on 2 random inputs of 3x16x16, 32-true, cpu"
    assert lines[2].split() == ["block", "policy", "error", "amplification", "gradient", "error", "angle"]
    assert sum(line.startswith("stages.") for line in lines) == 7
    assert "\nSound: the input of `stages." in output
    assert (tmp_path / "drift_revnet38_batch2.png").exists()
    assert lines[-1] == "picture  drift_revnet38_batch2.png"


def test_exact_reversal(revnet):
    output = revnet("doctor", "revnet38", "--batch", 2, "--image", 8, "--exact")[1]
    assert "\nExact: all streams are rebuilt to the last bit" in output
    assert "picture  drift_revnet38_batch2_exact.png" in output


def test_tolerance(revnet, own, assert_refused):
    output = revnet("doctor", f"{own}:steep", "--input-shape", "[16]", "--tolerance", "1e-3")[1]
    assert " keyframe" in output
    assert "\nSound: the input of `blocks." in output
    assert "picture  drift_own-reversible-steep_batch32_tolerance.png" in output
    assert_refused(["doctor", "revnet38", "--tolerance", 0], "`--tolerance` (=0.0) must be a finite number above 0")
    both = ["doctor", "revnet38", "--tolerance", 0.1, "--exact"]
    assert_refused(both, "`--exact` leaves no error for `--tolerance` to bound")


def test_output_is_deterministic(revnet):
    outputs = [revnet("doctor", "revnet38", "--batch", 2, "--image", 8, "--precision", "bf16-mixed") for _ in range(2)]
    assert outputs[0] == outputs[1]


def test_run_on_its_data(revnet, run_dir):
    code, output, errors = revnet("doctor", run_dir, "--data", "digits", "--batch", 8)
    assert (code, errors) == (0, "")
    assert ": a training step on 8 images of digits of 1x8x8, 32-true, cpu\n" in output
    assert "random inputs of 1x8x8" in revnet("doctor", run_dir / "last.safetensors", "--batch", 8)[1]
    assert "images of digits of 1x8x8" in revnet("doctor", "revnet38", "--data", "digits", "--batch", 8)[1]


OWN = """
import torch
from torch import nn
from revnet import ReversibleBlock, ReversibleSequential

def steep():
    torch.manual_seed(0)
    def f():
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model = ReversibleSequential(*[ReversibleBlock(f(), f()) for _ in range(40)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = steep()

    def forward(self, x):
        return self.blocks(x).no_such_attribute
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Return the name of a module with models."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_reversible.py").write_text(OWN)
    return "own_reversible"


def test_ill_conditioned_model_of_the_user(revnet, own):
    code, output, errors = revnet("doctor", f"{own}:steep", "--input-shape", "[16]")
    assert (code, errors) == (0, "")
    assert "\nWrong: the input of `blocks." in output
    assert "\n1. Bound the error: " in output
    assert "set_coupling(model, FixedPoint())" in output
    assert "picture  drift_own-reversible-steep_batch32.png" in output


def test_failing_step_prints_one_line(assert_refused, own):
    message = "the step failed: AttributeError: 'Tensor' object has no attribute 'no_such_attribute'"
    assert_refused(["doctor", f"{own}:Broken", "--input-shape", "[16]"], message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet32", "--batch", 1, "--image", 8], "`MODEL` (=ResNet) has no reversible block"),
        (
            ["revnet38", "--batch", 1, "--image", 1],
            "the step failed: ValueError: Expected more than 1 value per channel",
        ),
        (["revnet83"], "unknown model `revnet83`; did you mean `revnet38`"),
        (["runs/none"], "`runs/none` does not exist; pass a `.safetensors` or `.ckpt` file, or the folder of a run"),
        (["some.safetensors"], "`some.safetensors` does not exist"),
        (["revnet38", "--batch", 0], "`--batch` (=0) must be 1 or more"),
        (["revnet38", "--data", "nowhere"], "(='nowhere') is neither a data set of revnet"),
        (
            ["revnet38", "--data", "digits", "--batch", 10**5],
            "`--batch` (=100000) must not exceed the 1437 training",
        ),
        (["revnet38", "--input-shape", "[3]"], "`--input-shape` is for models of your own"),
    ],
)
def test_usage_errors_print_one_line(assert_refused, arguments, message):
    assert_refused(["doctor", *arguments], message)


def test_rejects_options_that_do_not_fit_a_checkpoint(assert_refused, tmp_path):
    path = save_checkpoint(tmp_path / "pets.safetensors", make_header(model="revnet38"))
    assert_refused(["doctor", path, "--image", 8], "`--image` is for models by name")
    assert_refused(["doctor", path, "--data", "digits"], "has images of 1x8x8, but")
