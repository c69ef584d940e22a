from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from revnet.training.run.callbacks import EpochLog, RunFiles, StepTimer
from revnet.training.run.task import AbstractTask, BestEpoch

HIGHEST_ACCURACY = BestEpoch("val_accuracy", is_highest=True)


class Task:
    device = torch.device("cpu")

    def __init__(self):
        self.logged = {}

    def log(self, name, value):
        self.logged[name] = value


def time_epoch(timer, clock, seconds):
    """Run an epoch whose updates take `seconds`, and return the logged time of a step."""
    task, trainer = (
        Task(),
        SimpleNamespace(num_training_batches=len(seconds), should_stop=False, accumulate_grad_batches=1),
    )
    timer.on_train_epoch_start(trainer, task)
    for index, duration in enumerate(seconds):
        timer.on_train_batch_start(trainer, task, None, index)
        clock.now += duration
        timer.on_train_batch_end(trainer, task, None, None, index)
    timer.on_train_epoch_end(trainer, task)
    return task.logged["step_seconds"]


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("revnet.training.run.callbacks.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_step_timer_logs_the_median_without_the_first_updates(clock):
    timer = StepTimer(batch_size=10, num_warmup=3)
    assert time_epoch(timer, clock, [64.0, 64.0]) == 64.0  # nothing else to count
    assert time_epoch(timer, clock, [64.0, 1.0, 2.0, 4.0]) == 2.0
    assert time_epoch(timer, clock, [8.0]) == 8.0


def make_trainer(epoch, **metrics):
    return SimpleNamespace(
        current_epoch=epoch,
        global_step=10 * (epoch + 1),
        callback_metrics={name: torch.tensor(value) for name, value in metrics.items()},
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.5}])],
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


def test_epoch_log_continues_from_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("revnet.training.run.callbacks.process_peak_bytes", lambda device: 1000)
    path = tmp_path / "metrics.csv"
    log = EpochLog(path)
    for epoch in range(2):
        log.on_train_epoch_start(make_trainer(epoch), None)
        log.on_train_epoch_end(make_trainer(epoch, train_loss=0.25, step_seconds=2.0), None)
    state = {"rows": list(log.rows), "lr": 0.5, "validation": {}}
    log.on_train_epoch_end(make_trainer(2, train_loss=0.25, step_seconds=2.0), None)  # lost with the process
    resumed = EpochLog(path)
    resumed.load_state_dict(state)
    resumed.on_train_epoch_start(make_trainer(2), None)
    resumed.on_train_epoch_end(make_trainer(2, train_loss=0.5, step_seconds=2.0), None)
    assert path.read_text().splitlines() == [
        "epoch,updates,lr,train_loss,step_seconds,peak_bytes",
        "1,10,0.5,0.25,2.0,1000",
        "2,20,0.5,0.25,2.0,1000",
        "3,30,0.5,0.5,2.0,1000",
    ]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_epoch_log_stops_a_diverged_run(tmp_path, loss):
    log = EpochLog(tmp_path / "metrics.csv")
    log.on_train_epoch_start(make_trainer(0), None)
    with pytest.raises(
        ValueError, match=rf"`lr` \(=0.5\) made the training loss {loss} in epoch 1; pass a smaller one"
    ):
        log.on_train_epoch_end(make_trainer(0, train_loss=loss, step_seconds=2.0), None)
    assert not (tmp_path / "metrics.csv").exists()


def test_best_epoch_is_the_earliest_with_the_highest_accuracy(tmp_path):
    files = RunFiles(tmp_path, HIGHEST_ACCURACY)
    accuracies = [0.5, 0.75, 0.25, 0.75]
    assert [files._is_best(make_trainer(i, val_accuracy=a)) for i, a in enumerate(accuracies)] == [
        True,
        True,
        False,
        False,
    ]
    assert files.best_score == 0.75


def test_last_epoch_is_best_without_validation(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr("revnet.training.run.callbacks.save_weights", lambda module, path: saved.append(path.name))
    files = RunFiles(tmp_path, HIGHEST_ACCURACY)
    task = MagicMock(spec=AbstractTask)
    for epoch in range(3):
        files.on_train_epoch_end(make_trainer(epoch), task)
    assert saved == ["best.safetensors", "last.safetensors"] * 3
    assert (files.best_epoch, files.best_score) == (3, None)


def test_last_epoch_does_not_replace_the_best_validation_after_a_stop(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr("revnet.training.run.callbacks.save_weights", lambda module, path: saved.append(path.name))
    files = RunFiles(tmp_path, HIGHEST_ACCURACY)
    files.load_state_dict({"best_epoch": 1, "best_val_accuracy": 0.5})
    files.on_train_epoch_end(make_trainer(1), MagicMock(spec=AbstractTask))
    assert saved == ["last.safetensors"]
