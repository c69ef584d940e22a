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


def best_epochs(files, metric, validations):
    """Return, for each validation, whether it is the best so far."""
    return [
        files._is_best(make_trainer(epoch, **{metric: score, "val_loss": loss}))
        for epoch, (score, loss) in enumerate(validations)
    ]


def test_best_epoch_has_the_highest_accuracy_then_the_lowest_loss_then_comes_last(tmp_path):
    files = RunFiles(tmp_path, HIGHEST_ACCURACY)
    validations = [(0.5, 9.0), (0.75, 4.0), (0.25, 1.0), (0.75, 5.0), (0.75, 4.0), (0.75, 3.0), (1.0, 8.0), (0.75, 1.0)]
    assert best_epochs(files, "val_accuracy", validations) == [True, True, False, False, True, True, True, False]
    assert files.best_score == 1.0


def test_best_epoch_has_the_lowest_loss_then_comes_last(tmp_path):
    files = RunFiles(tmp_path, BestEpoch("val_loss", is_highest=False))
    assert best_epochs(files, "val_loss", [(loss, loss) for loss in (3.0, 2.0, 2.5, 2.0)]) == [True, True, False, True]
    assert files.best_score == 2.0


def test_best_epoch_of_a_resumed_run(tmp_path):
    """An older checkpoint has no loss for a classifier; the next equal accuracy wins."""
    validations = [(0.75, 4.0), (0.75, 5.0), (0.75, 3.0)]
    for number in range(3):
        stopped, resumed, straight = (RunFiles(tmp_path, HIGHEST_ACCURACY) for _ in range(3))
        best_epochs(stopped, "val_accuracy", validations[:number])
        resumed.load_state_dict(stopped.state_dict())
        best_epochs(resumed, "val_accuracy", validations[number:])
        best_epochs(straight, "val_accuracy", validations)
        assert resumed.state_dict() == straight.state_dict()
    older = RunFiles(tmp_path, HIGHEST_ACCURACY)
    older.load_state_dict({"best_epoch": 1, "best_val_accuracy": 0.75})
    assert best_epochs(older, "val_accuracy", [(0.5, 1.0), (0.75, 4.0), (0.75, 5.0)]) == [False, True, False]


def test_last_epoch_is_best_without_validation(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        "revnet.training.run.callbacks.save_weights", lambda module, path, epoch: saved.append(f"{path.name} {epoch}")
    )
    files = RunFiles(tmp_path, HIGHEST_ACCURACY)
    task = MagicMock(spec=AbstractTask)
    for epoch in range(3):
        files.on_train_epoch_end(make_trainer(epoch), task)
    assert saved == [f"{name}.safetensors {epoch}" for epoch in (1, 2, 3) for name in ("best", "last")]
    assert (files.best_epoch, files.best_score) == (3, None)


def test_last_epoch_does_not_replace_the_best_validation_after_a_stop(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        "revnet.training.run.callbacks.save_weights", lambda module, path, epoch: saved.append(f"{path.name} {epoch}")
    )
    files = RunFiles(tmp_path, HIGHEST_ACCURACY)
    files.load_state_dict({"best_epoch": 1, "best_val_accuracy": 0.5})
    files.on_train_epoch_end(make_trainer(1), MagicMock(spec=AbstractTask))
    assert saved == ["last.safetensors 2"]
