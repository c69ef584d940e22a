"""Runs in two processes resume bit for bit, and on another number of processes from the same weights."""

import shutil
from typing import Any

import pytest
import torch

from revnet.training import LanguageConfig, NiceConfig, TrainConfig, load_classifier, load_language_model, resume
from revnet.training.run.checkpoint import find_weights, read_weights
from tests.copies import launch_copies
from tests.training.own_code import tiny_revnet
from tests.training.processes.resume_programs import WriteState, train_and_resume_all
from tests.training.samples import TINY, assert_same_run, newest_checkpoint, read_log, write_text

LANGUAGE: dict[str, Any] = {
    "length": 16,
    "batch_size": 4,
    "dim": 16,
    "depth": 2,
    "num_heads": 2,
    "dropout": 0.1,
    "updates_per_epoch": 2,
    "epochs": 2,
    "val_windows": 8,
}
RECIPE: dict[str, Any] = {
    "accumulate": 2,
    "val_every": 1,
    "schedule": "plateau",
    "plateau_patience": 0,
    "patience": 9,
    "max_grad_norm": None,
    "max_grad_value": 0.1,
}
RUNS = ["classifier", "lm fsdp2", "recipe"]
MORE_RUNS = ["nice", "lm", "recipe fsdp2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return runs in two processes, each with runs that continue from its checkpoints."""
    return train_and_resume(RUNS, tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory):
    return train_and_resume(MORE_RUNS, tmp_path_factory.mktemp("resume"))


def train_and_resume(names, folder):
    text = write_text(folder, 20)
    configs = {
        "classifier": TrainConfig(model=TINY, batch_size=400, max_updates=3, horizontal_flip=True),
        "nice": NiceConfig(hidden_dim=16, num_couplings=2, num_hidden=1, epochs=2, batch_size=600),
        "lm": LanguageConfig(data=text, **LANGUAGE),
        "lm fsdp2": LanguageConfig(data=text, strategy="fsdp2", **LANGUAGE),
        "recipe": NiceConfig(
            hidden_dim=16, num_couplings=2, num_hidden=1, max_updates=3, batch_size=600, ema_decay=0.9, **RECIPE
        ),
        "recipe fsdp2": LanguageConfig(data=text, strategy="fsdp2", **LANGUAGE, **RECIPE),
    }
    arguments = {"configs": {name: configs[name] for name in names}, "folder": folder}
    return launch_copies(train_and_resume_all, arguments)


@pytest.mark.parametrize("name", RUNS)
def test_resumes_from_every_checkpoint(runs, name):
    check_resumed_runs(*runs[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_RUNS)
def test_more_runs_resume_from_every_checkpoint(more_runs, name):
    check_resumed_runs(*more_runs[name])


def check_resumed_runs(result, resumed):
    assert len(resumed) == result.num_updates > 2
    for other in resumed:
        assert_same_run(result, other)


def test_shards_are_read_like_a_file(runs):
    result, _ = runs["lm fsdp2"]
    checkpoint = newest_checkpoint(result.folder)
    assert checkpoint.is_dir()
    expected = load_language_model(result.folder / "last.safetensors").state_dict()
    assert find_weights(checkpoint) == checkpoint
    actual = load_language_model(checkpoint).state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("devices", "strategy"),
    [
        (1, "fsdp2"),
        (1, "ddp"),
        pytest.param(4, "fsdp2", marks=pytest.mark.slow),
        pytest.param(2, "ddp", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:`devices`")
def test_shards_of_two_processes_continue_on_another_number(runs, tmp_path, devices, strategy):
    folder = runs["lm fsdp2"][1][0].folder
    copy = shutil.copytree(folder, tmp_path / "copy")
    for path in sorted((copy / "checkpoints").glob("*.ckpt"))[1:]:
        shutil.rmtree(path)
    (checkpoint,) = (copy / "checkpoints").glob("*.ckpt")
    saved = read_weights(checkpoint).tensors
    result = resume(copy, devices=devices, strategy=strategy, quiet=True, callbacks=[WriteState(tmp_path / "state.pt")])
    restored = torch.load(tmp_path / "state.pt", weights_only=True)
    assert saved.keys() == restored.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in saved.items())
    assert result.num_updates == 4
    if devices == 2:  # so that dropout draws the same numbers
        assert_close_logs(runs["lm fsdp2"][0].folder, copy)


@pytest.mark.slow
def test_file_of_a_whole_model_continues_in_shards(more_runs, tmp_path):
    result, resumed = more_runs["lm"]
    copy = shutil.copytree(resumed[0].folder, tmp_path / "copy")
    for path in sorted((copy / "checkpoints").glob("*.ckpt"))[1:]:
        path.unlink()
    resume(copy, devices=2, strategy="fsdp2", quiet=True)
    assert newest_checkpoint(copy).is_dir()
    assert_close_logs(result.folder, copy)


def assert_close_logs(expected, actual):
    """Compare the losses of two runs, in which another order of sums changes the last digits."""
    logs = [read_log(folder) for folder in (expected, actual)]
    for rows in zip(*logs, strict=True):
        for name in ("train_loss", "val_loss"):
            assert float(rows[1][name]) == pytest.approx(float(rows[0][name]), rel=1e-5)


def test_run_of_two_processes_loads_like_any_other(runs):
    classifier = load_classifier(runs["classifier"][0].folder, model=tiny_revnet(10, 1))
    assert classifier.header.num_classes == 10
