"""A run that is killed at random moments, again and again, ends as if nothing had happened."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from revnet.training import LanguageConfig, NiceConfig, TrainConfig
from tests.training.kills import Driver, kill_and_compare
from tests.training.samples import assert_same_logs, write_text

NICE = NiceConfig(
    batch_size=100, epochs=2, num_couplings=4, hidden_dim=64, num_hidden=2, horizontal_flip=True, save_every=4
)
MEASURED = ("seconds", "process_peak_bytes", "machine")


def assert_equal_folders(straight: Path, killed: Path) -> None:
    """Compare weights, log and summary of two runs, apart from times."""
    for name in ("best.safetensors", "last.safetensors"):
        expected, actual = load_file(straight / name), load_file(killed / name)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items()), name
    assert_same_logs(straight, killed)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (straight, killed)]
    scores = [{key: x for key, x in summary.items() if not key.endswith(MEASURED)} for summary in summaries]
    assert scores[0] == scores[1]
    assert not list(killed.rglob("*.tmp"))


def test_run_survives_three_kills(tmp_path):
    driver = Driver(NICE, 1, random.Random(0))
    kill_and_compare(driver, tmp_path, 3, 3, assert_equal_folders)


def make_config(task: str, tmp_path: Path, **more: Any) -> Any:
    if task == "digits":
        return TrainConfig(batch_size=100, max_updates=16, save_every=3, horizontal_flip=True, **more)
    if task == "nice":
        return NiceConfig(batch_size=100, epochs=3, num_couplings=4, hidden_dim=64, num_hidden=2, save_every=5, **more)
    return LanguageConfig(
        data=write_text(tmp_path, 50),
        length=32,
        batch_size=8,
        dim=32,
        depth=2,
        num_heads=2,
        dropout=0.1,
        epochs=3,
        updates_per_epoch=10,
        save_every=4,
        **more,
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("task", ["digits", "nice", "lm"])
def test_run_survives_random_kills(tmp_path, task, num_processes):
    for seed, is_async in ((0, False), (1, True)):
        driver = Driver(make_config(task, tmp_path, async_save=is_async), num_processes, random.Random(seed))
        folder = tmp_path / str(seed)
        folder.mkdir()
        num_runs = kill_and_compare(driver, folder, 5, 5, assert_equal_folders)
        print(f"{task}, {num_processes} processes: 5 kills, {num_runs} runs, most lost {driver.most_lost} updates")
