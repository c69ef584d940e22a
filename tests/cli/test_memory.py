"""`revnet memory`: its flags, table and picture. tests/memory tests the counts."""

from functools import partial

import pytest
import torch

from revnet import Checkpoint, create_model, set_policy
from revnet._torch_release import RELEASE
from revnet.memory import format_bytes, predict


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def peak_of(model, batch):
    with torch.device("meta"):
        images = torch.empty(batch, 3, 32, 32)
    memory = predict(model, images, optimizer=partial(torch.optim.SGD, momentum=0.9))
    return format_bytes(memory.peak_bytes)


def test_table_and_picture(revnet, tmp_path):
    pytest.importorskip("matplotlib")
    code, output, errors = revnet("memory", "revnet38", "--batch", "4", "--depth", "1")
    assert (code, errors) == (0, "")
    assert output.startswith("revnet38: a training step on 4 inputs of 3x32x32, SGD with momentum, 32-true, cpu, pred")
    assert f"peak {peak_of(create_model('revnet38'), 4)}, in the " in output
    for words in (
        "parameters",
        "optimizer state",
        "gradients",
        "activations, held",
        "stages",
        "picture  memory_revnet38",
    ):
        assert words in output
    assert "\nstages.0" not in output
    assert (tmp_path / "memory_revnet38_batch4.png").exists()


def test_one_policy_for_all_blocks(revnet):
    model = create_model("resnet32")
    set_policy(model, Checkpoint())
    output = revnet("memory", "resnet32", "--batch", "4", "--policy", "checkpoint")[1]
    assert f"peak {peak_of(model, 4)}, in the " in output
    assert "picture  memory_resnet32_batch4_checkpoint.png" in output


def test_measured_peak_equals_the_prediction(revnet):
    output = revnet("memory", "revnet38", "--batch", "4", "--measure")[1]
    peak = peak_of(create_model("revnet38"), 4)
    assert f"measured; the predicted peak is {peak}\n" in output
    assert f"\npeak {peak}, in the " in output


def test_step_in_the_backward_pass(revnet):
    arguments = ["memory", "revnet38", "--batch", "2", "--image", "8", "--step-in-backward", "--measure"]
    output = revnet(*arguments)[1]
    with torch.device("meta"):
        images = torch.empty(2, 3, 8, 8)
    optimizer = partial(torch.optim.SGD, momentum=0.9)
    memory = predict(create_model("revnet38"), images, optimizer=optimizer, step_in_backward=True)
    peak = format_bytes(memory.peak_bytes)
    assert f"measured; the predicted peak is {peak}\n" in output
    assert f"\npeak {peak}, in the " in output
    assert peak != format_bytes(predict(create_model("revnet38"), images, optimizer=optimizer).peak_bytes)


OWN = """
from torch import nn

class Branching(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        y = super().forward(x)
        return y * 2 if y.sum() > 0 else y

class Broken(Branching):
    def forward(self, x):
        return super().forward(x).no_such_attribute

def tokens():
    return nn.Embedding(10, 4)
"""


@pytest.fixture
def own_models(tmp_path, monkeypatch):
    """Return the name of a module that defines two models."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_models.py").write_text(OWN)
    return "own_models"


def test_measures_a_model_that_needs_values(revnet, assert_refused, own_models):
    arguments = ["memory", f"{own_models}:Branching", "--input-shape", "[4]"]
    assert_refused(arguments, "cannot be predicted, because it asks for the value of a tensor")
    assert_refused(arguments, "; pass `--measure`, with a small `--batch`, to run a real step.")
    code, output, errors = revnet(*arguments, "--measure")
    assert (code, errors) == (0, "")
    assert "32 inputs of 4, SGD with momentum, 32-true, cpu, measured\n\npeak " in output


# Until 2.11, the shape function of an embedding took any dtype.
PREDICT = pytest.param([], marks=pytest.mark.skipif(RELEASE < (2, 12), reason="found in 2.12 or later"))


@pytest.mark.parametrize("flags", [PREDICT, ["--measure"]])
def test_wrong_dtype_names_the_option(assert_refused, own_models, flags):
    message = "pass another `--input-dtype`: float32 or int64\n"
    assert_refused(["memory", f"{own_models}:tokens", "--input-shape", "[5]", *flags], message)


def test_failing_step_prints_one_line(assert_refused, own_models):
    message = "the step failed: AttributeError: 'Tensor' object has no attribute 'no_such_attribute'"
    assert_refused(["memory", f"{own_models}:Broken", "--input-shape", "[4]", "--measure"], message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["revnet38", "--policy", "keep"], "`--policy` (=keep) must be `reverse` or `checkpoint` or `store` or null"),
        (["resnet32", "--policy", "reverse"], "has no unit that accepts the policy Reverse()"),
        (["revnet38", "--depth", "-1"], "`--depth` (=-1) must be"),
        (["revnet38", "--precision", "8"], "`--precision` (=8) must be `32-true` or `bf16-mixed`"),
        (["nothing"], "unknown model `nothing`"),
        (["revnet38", "--optimizer", "none", "--step-in-backward"], "`--step-in-backward` needs an optimizer"),
    ],
)
def test_usage_errors_print_one_line(assert_refused, arguments, message):
    assert_refused(["memory", *arguments], message)


def test_full_disk_names_the_option(revnet, full_disk):
    pytest.importorskip("matplotlib")
    code, _, errors = revnet("memory", "revnet38", "--batch", "4", "--out-dir", "pictures")
    assert (code, errors) == (
        2,
        "revnet memory: error: `--out-dir` (='pictures') cannot be written: No space left on device; pass a folder "
        "that you can write to.\n",
    )
