"""`revnet plan --devices`: flags, tables and the budget. tests/memory/distributed tests the bytes."""

import pytest

OWN = """
from torch import nn
from revnet import ReversibleBlock, ReversibleSequential

def net():
    blocks = [ReversibleBlock(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(4)]
    return nn.Sequential(nn.Linear(3, 8), ReversibleSequential(*blocks), nn.Linear(8, 2))
"""
NET = ["own_layers:net", "--input-shape", "[3]"]


@pytest.fixture(autouse=True)
def _in_a_folder_with_an_own_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_layers.py").write_text(OWN)


def test_prints_the_memory_of_a_sharded_step(revnet, tmp_path):
    code, output, errors = revnet(
        "plan", *NET, "--batch", "64", "--devices", "64", "--strategy", "fsdp2", "--budget", "1MiB"
    )
    assert (code, errors) == (0, "")
    first, second, *_ = output.splitlines()
    assert first == "own_layers:net: a training step on 64 inputs of 3, SGD with momentum, 32-true, cpu"
    assert second == "fsdp2, 64 devices, each with a part of every parameter, sharded by block"
    for words in (
        "on each device, in the",
        "  optimizer state",
        "activations held between the passes",
        "all-gather",
        "reduce-scatter",
        "Padding: FSDP2 cuts",
        "budget 1.0 MiB on each device, of which",
    ):
        assert words in output
    assert "to train" not in output
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".png"] == []


def test_options_of_sharding(revnet):
    arguments = [*NET, "--batch", "4", "--devices", "2", "--strategy", "fsdp2"]
    blocks = revnet("plan", *arguments)[1]
    functions = revnet("plan", *arguments, "--shard-unit", "function", "--keep-gathered")[1]
    assert "sharded by function" in functions
    calls = [next(line for line in text.splitlines() if "forward  " in line).split()[2] for text in (blocks, functions)]
    assert calls == ["5", "9"]
    assert "backward      all-gather" in blocks
    assert "backward      all-gather" not in functions


def test_prints_the_memory_of_replicas(revnet):
    output = revnet("plan", *NET, "--batch", "4", "--devices", "2", "--strategy", "ddp", "--optimizer", "adamw")[1]
    assert "ddp, 2 devices, each with a whole model" in output
    assert "all-reduce" in output
    assert "Padding" not in output


def test_prints_the_stages_of_a_pipeline(revnet):
    output = revnet("plan", *NET, "--batch", "16", "--devices", "2", "--strategy", "pipeline")[1]
    assert "pipeline, 2 devices, each with some of the blocks, 8 microbatches" in output
    assert "to the stage before" in output
    few = revnet("plan", *NET, "--batch", "16", "--devices", "2", "--strategy", "pipeline", "--microbatches", "2")[1]
    assert "2 microbatches" in few


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "8"], "`--devices` (=8) needs `--strategy`: ddp, fsdp2 or pipeline."),
        (["--strategy", "ddp"], "`--strategy` needs `--devices`: the number of devices, such as --devices 8."),
        (["--microbatches", "4"], "`--microbatches` needs `--devices`"),
        (["--shard-unit", "block"], "`--shard-unit` needs `--devices`"),
        (["--keep-gathered"], "`--keep-gathered` needs `--devices`"),
        (["--devices", "0", "--strategy", "ddp"], "`--devices` (=0) must be 1 or more."),
        (["--devices", "1025", "--strategy", "ddp"], "`--devices` (=1025) must be 1024 or less."),
        (["--devices", "auto", "--strategy", "ddp"], "`--devices`"),
        (["--devices", "8", "--strategy", "fsdp"], "`--strategy`"),
        (["--devices", "3", "--strategy", "fsdp2"], "must be divisible by `--devices` (=3); pass 33."),
        (
            ["--devices", "3", "--strategy", "pipeline"],
            "must be divisible by the number of microbatches (=12); pass 36.",
        ),
        (
            ["--devices", "2", "--strategy", "pipeline", "--microbatches", "5"],
            "must be divisible by `--microbatches` (=5); pass 35.",
        ),
        (
            ["--devices", "4", "--strategy", "pipeline", "--microbatches", "2"],
            "`--microbatches` (=2) must be at least `--devices` (=4)",
        ),
        (
            ["--devices", "2", "--strategy", "pipeline", "--microbatches", "0"],
            "`--microbatches` (=0) must be",
        ),
        (
            ["--devices", "2", "--strategy", "ddp", "--microbatches", "2"],
            "`--microbatches` is for `--strategy",
        ),
        (["--devices", "2", "--strategy", "ddp", "--shard-unit", "block"], "`--shard-unit` is for `--strategy fsdp2`"),
        (
            ["--devices", "2", "--strategy", "pipeline", "--keep-gathered"],
            "`--keep-gathered` is for `--strategy",
        ),
        (["--devices", "2", "--strategy", "ddp", "--measure"], "`--measure` times steps on one device"),
        (["--devices", "2", "--strategy", "ddp", "--out-dir", "x"], "`--out-dir` is for the picture"),
        (["--devices", "2", "--strategy", "ddp", "--device", "cuda"], "`--device` (=cuda) must be auto or cpu"),
        (["--devices", "2", "--strategy", "ddp", "--budget", "x"], "`--budget` (='x') must be a number of bytes"),
        (
            ["--devices", "8", "--strategy", "pipeline"],
            "has 4 blocks, fewer than 8 stages, so it cannot",
        ),
    ],
)
def test_usage_errors_print_one_line(assert_refused, tmp_path, arguments, message):
    assert_refused(["plan", *NET, *arguments], message)
    assert not (tmp_path / "x").exists()


def test_a_model_that_cannot_be_cut_prints_one_line(assert_refused):
    assert_refused(
        ["plan", "revnet38", "--batch", "8", "--devices", "2", "--strategy", "pipeline"],
        "has 3 reversible sequences instead of one, so it cannot run as a pipeline; use the strategy fsdp2 instead.",
    )


def test_peak_above_the_budget_prints_one_line(revnet):
    code, output, errors = revnet("plan", *NET, "--devices", "2", "--strategy", "ddp", "--budget", "1KiB")
    assert code == 2
    assert "at the peak" in output
    assert errors.count("\n") == 1
    assert "below the peak of a device" in errors


def test_help_has_an_example(revnet):
    assert "revnet plan revnet104 --batch 1024 --devices 8 --strategy fsdp2" in revnet("plan", "--help")[1]
