"""Settings of a recipe in two processes against one, with the same global batches."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from revnet.training import LanguageConfig, TrainConfig, entry, train
from revnet.training.processes.prepare_model import check_processes
from revnet.training.processes.world import World
from tests.copies import launch_copies
from tests.training.processes import training_programs as programs
from tests.training.processes.test_devices import ROUNDING
from tests.training.samples import write_text

SETTINGS: dict[str, dict[str, Any]] = {
    "parts ddp": {"accumulate": 3, "ema_decay": 0.5},
    "parts fsdp2": {"accumulate": 3, "freeze": "embedding,blocks.blocks.0.f"},
    "clipped fsdp2": {"max_grad_norm": None, "max_grad_value": 1e-3},
    "in backward fsdp2": {"max_grad_norm": None, "max_grad_value": 1e-3, "step_in_backward": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return each run in one process and in two: its result and its losses."""
    folder = tmp_path_factory.mktemp("recipes")
    text = write_text(folder, 60)
    small = {"length": 16, "dim": 16, "depth": 2, "num_heads": 2, "batch_size": 6, "val_windows": 11}
    lengths = {"updates_per_epoch": 2, "epochs": 2}
    configs = {name: LanguageConfig(data=text, **small, **lengths, **more) for name, more in SETTINGS.items()}
    two = {
        name: replace(config, strategy=name.split()[-1], out_dir=str(folder / f"{name} in two"))
        for name, config in configs.items()
    }
    one = {name: replace(config, out_dir=str(folder / name)) for name, config in configs.items()}
    return programs.train_all(one), launch_copies(programs.train_all, {"configs": two})


def sum_parts(losses: list[float], num_parts: int) -> list[float]:
    """Return the loss of each update, whose parts hold other samples in two processes than in one."""
    return [sum(losses[start : start + num_parts]) for start in range(0, len(losses), num_parts)]


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_equal_one_process(runs, name):
    (one, losses), (two, other_losses) = (part[name] for part in runs)
    num_parts = SETTINGS[name].get("accumulate", 1)
    assert sum_parts(other_losses, num_parts) == pytest.approx(sum_parts(losses, num_parts), rel=ROUNDING)
    expected, actual = (load_file(result.folder / "last.safetensors") for result in (one, two))
    assert all(torch.allclose(actual[key], x, rtol=ROUNDING, atol=ROUNDING) for key, x in expected.items())
    parts = ", in 3 parts" if name.startswith("parts") else ""
    assert f"a step of 3 windows in each of 2 processes{parts}, reversible" in two.report()


def test_clips_divided_gradients_in_the_backward_pass(runs):
    ordinary, in_backward = (runs[1][name][0] for name in ("clipped fsdp2", "in backward fsdp2"))
    expected, actual = (load_file(result.folder / "last.safetensors") for result in (ordinary, in_backward))
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())
    assert in_backward.state_bytes.gradients < ordinary.state_bytes.gradients / 4


def test_rejects_a_step_in_the_backward_pass_under_ddp():
    config = TrainConfig(device="cpu", step_in_backward=True)
    check_processes(config, World())
    with pytest.raises(ValueError, match=r"^`step_in_backward` \(=True\) does not go with several processes under ddp"):
        check_processes(config, World(num_processes=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_in_backward": True}, "`step_in_backward`"),
        ({"batch_size": 9}, "`batch_size` \\(=9\\) must be a multiple of the 2 processes"),
        ({"batch_size": 6, "accumulate": 2}, "`batch_size` \\(=6\\) must be a multiple of 4, since 2 processes"),
    ],
)
def test_refuses_before_it_starts_processes(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(entry, "run_in_processes", None)
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(device="cpu", devices=2, out_dir=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()
