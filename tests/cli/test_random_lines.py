"""No command line shows a traceback: the status is 0 or 2, and an error is one line.

Everything runs as it does for a user, in this process, except what would take long or leave the machine: the updates of
a run, the processes of a run on several devices, the trial runs of `--find-lr`, the measurements of `bench` and
`figure`, the runs of `reproduce`, and downloads.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from revnet.cli.main import main
from revnet.errors import DataError
from tests.cli.random_lines import make_lines, write_files
from tests.training.samples import write_images

LM = [
    "--length",
    "8",
    "--depth",
    "1",
    "--dim",
    "8",
    "--num-heads",
    "2",
    "--updates-per-epoch",
    "2",
    "--num-threads",
    "1",
]
NICE = ["--num-couplings", "2", "--hidden-dim", "8", "--num-hidden", "1", "--batch-size", "600"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines")
    write_files(folder)
    write_images(folder, 1)[0].rename(folder / "image.png")
    runs = [
        ["train", "--batch-size", "600", "--out-dir", "classifier"],
        ["train", "nice", *NICE, "--out-dir", "nice"],
        ["train", "lm", "--data", "text.txt", *LM, "--out-dir", "lm"],
    ]
    before = Path.cwd()
    os.chdir(folder)
    try:
        for arguments in runs:
            assert main([*arguments, "--epochs", "1"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def stubs(monkeypatch):
    """Replace what takes long, or leaves the machine."""
    result = SimpleNamespace(report=lambda: "done", suggestion=0.1, plot=lambda path: None, device="cpu")
    page = Path("text.txt")

    def offline(*args, **kwargs):
        raise DataError("the hub cannot be reached.")

    for name, stub in {
        "revnet.training.entry.execute": lambda *args, **kwargs: result,
        "revnet.training.entry.run_in_processes": lambda *args, **kwargs: result,
        "revnet.training.evaluation.evaluate.run_in_processes": offline,
        "revnet.training.evaluation.predict_images.run_in_processes": offline,
        "revnet.training.find_lr": lambda config: result,
        "revnet.bench.run_benchmark": lambda *args, **kwargs: page,
        "revnet.bench.run_host_benchmark": lambda *args, **kwargs: page,
        "revnet.paper.run_gradient_angle": lambda *args, **kwargs: page,
        "revnet.paper.run_complexity": lambda *args, **kwargs: page,
        "revnet.paper.reproduction._train": lambda *args, **kwargs: None,
        "revnet.data.sources.hub.load_hub_dataset": offline,
        "revnet.data.sources.catalog.load_hub_dataset": offline,
    }.items():
        monkeypatch.setattr(name, stub)


def check(lines, files, tmp_path, monkeypatch, capsys):
    """Assert the status and the errors of each command line, which has a copy of the files."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    folder = tmp_path / "work"
    shutil.copytree(files, folder)
    monkeypatch.chdir(folder)
    statuses, faults = [], []
    for words in lines:
        line = f"revnet {shlex.join(words)}"
        try:
            status = main(words)
        except BaseException as error:
            capsys.readouterr()
            faults.append(f"{line}\n    {type(error).__name__}: {error}")
            continue
        errors = capsys.readouterr().err.splitlines()
        statuses.append(status)
        is_line = all(error.startswith(("revnet", "weights: ")) for error in errors)
        num_errors = sum(": error: " in error for error in errors)
        reads_images = words[0] in ("predict", "score")
        most = len(words) if reads_images else 1  # a line for each image, and the exit status 1
        failed = status in ((1, 2) if reads_images else (2,))
        if (status != 0 and not failed) or not is_line or not failed <= num_errors <= failed * most:
            faults.append(f"{line}\n    status {status}: {errors}")
    assert not faults, "\n".join([f"{len(faults)} of {len(lines)} command lines:", *faults])
    assert {0, 2} <= set(statuses) <= {0, 1, 2}


@pytest.mark.filterwarnings("default")
def test_some_random_command_lines(files, stubs, tmp_path, monkeypatch, capsys):
    check(make_lines(seed=1, count=30), files, tmp_path, monkeypatch, capsys)


def test_a_planted_fault_is_reported(files, stubs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("revnet.cli.recipes.list_recipes", lambda: 1 // 0)
    with pytest.raises(AssertionError, match=r"1 of 2 command lines:\s+revnet recipes\s+ZeroDivisionError: "):
        check([["recipes"], ["recipes", "--help"]], files, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("seed", range(2, 12))
def test_random_command_lines(files, stubs, tmp_path, monkeypatch, capsys, seed):
    check(make_lines(seed=seed, count=100), files, tmp_path, monkeypatch, capsys)
