"""`revnet figure`: its flags and files. tests/paper tests the measurements."""

import shlex
from pathlib import Path

import pytest
import torch

import revnet.paper
from revnet.cli._parser import parse
from revnet.cli.figure import figure
from revnet.paper.complexity.costs import QUICK_COMPLEXITY, ComplexitySettings
from revnet.training import TrainConfig


@pytest.fixture
def calls(monkeypatch):
    """Replace the measurements, and return the calls."""
    calls = []

    def record(*arguments, **options):
        calls.append((*arguments, options))
        return arguments[1] / "page.md"

    for name in ("run_gradient_angle", "run_complexity"):
        monkeypatch.setattr(revnet.paper, name, record, raising=False)
    return calls


def test_gradient_angle_without_options(revnet, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert revnet("figure", "gradient-angle") == (0, "wrote page.md, its CSV and its picture\n", "")
    options = {"every": 50, "with_reference": False}
    assert calls == [(TrainConfig(), Path(), "revnet figure gradient-angle --every 50", options)]


def test_gradient_angle_takes_training_settings(revnet, calls, tmp_path):
    (tmp_path / "settings.yaml").write_text("epochs: 7\ndecay_at: [0.25, 0.5]\ndata: my images\nout_dir: null\n")
    arguments = ["--config", tmp_path / "settings.yaml", "--every", 3, "--reference", "--crop-padding=2", "--nesterov"]
    assert revnet("figure", "gradient-angle", *arguments, "--out-dir", tmp_path / "out")[0] == 0
    ((config, folder, command, options),) = calls
    assert config == TrainConfig(epochs=7, decay_at=(0.25, 0.5), data="my images", crop_padding=2, nesterov=True)
    assert folder == tmp_path / "out"
    assert options == {"every": 3, "with_reference": True}
    given = parse(figure, "revnet figure", shlex.split(command)[2:])  # the command on the page makes the same
    assert (given.pop("name"), given.pop("every"), given.pop("reference")) == ("gradient-angle", 3, True)
    assert TrainConfig(**given) == config


def test_complexity(revnet, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    assert revnet("figure", "complexity")[0] == 0
    assert revnet("figure", "complexity", "--quick", "--device", "cpu", "--out-dir", "somewhere")[0] == 0
    assert calls == [
        (ComplexitySettings(), Path("benchmarks/results"), "revnet figure complexity --device cpu", {}),
        (QUICK_COMPLEXITY, Path("somewhere"), "revnet figure complexity --quick --device cpu", {}),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gradient-angles"], "unknown figure `gradient-angles`; did you mean `gradient-angle`?"),
        (["xyz"], "unknown figure `xyz`; the figures are gradient-angle and complexity."),
        (["gradient-angle", "--every", "0"], "`--every` (=0) must be 1 or more; 50 is usual."),
        (["gradient-angle", "--every", "often"], "`--every` (=often) must be an integer or null."),
        (
            ["gradient-angle", "--quick"],
            "`--quick` is for complexity; to shorten gradient-angle, pass fewer",
        ),
        (["gradient-angle", "--epochs", "0"], "`--epochs` (=0) must be 1 or more"),
        (["gradient-angle", "--epoch", "3"], "unknown option `--epoch`; did you mean `--epochs`?"),
        (["complexity", "--every", "50"], "`--every` is for gradient-angle; leave it out."),
        (["complexity", "--reference"], "`--reference` is for gradient-angle; leave it out."),
        (["complexity", "--batch-size", "3"], "`--batch-size` is for gradient-angle; leave it out."),
        (["complexity", "--device", "mps"], "`--device` (=mps) must be auto, cpu or cuda for complexity."),
    ],
)
def test_usage_errors_print_one_line(assert_refused, calls, arguments, message):
    assert_refused(["figure", *arguments], message)
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet32"], "`--model` (='resnet32') has no reversible block, so nothing is rebuilt"),
        (["--policy", "store"], "`--policy` (='store') must not be set, since both policies are run; leave it out."),
        (
            ["--memory-budget", "1GiB"],
            "`--memory-budget` (='1GiB') must not be set, since one run rebuilds everything and",
        ),
        (["--batch-size", "5000"], "`--batch-size` (=5000) must not exceed the 1,293 training images"),
    ],
)
def test_rejected_settings_write_nothing(assert_refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert_refused(["figure", "gradient-angle", *arguments], message)
    assert not list(tmp_path.iterdir())


def test_gradient_angle_of_two_updates(revnet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--max-updates", 2, "--batch-size", 20, "--every", 2, "--out-dir", "figures"]
    code, output, errors = revnet("figure", "gradient-angle", *arguments)
    assert (code, errors) == (0, "")
    page = Path(output.splitlines()[-1].removeprefix("wrote ").partition(",")[0])
    assert page.parent == Path("figures")
    assert {path.suffix for path in page.parent.iterdir()} == {".md", ".csv", ".png"}
    assert "`revnet figure gradient-angle --every 2 --max-updates 2 --batch-size 20`" in page.read_text().replace(
        "OMP_NUM_THREADS=1 ", ""
    )
    assert len(list(Path("runs").iterdir())) == 2
