"""Loggers and the log by update, in short runs on digits."""

import json
import sqlite3
from importlib.util import find_spec
from pathlib import Path

import pytest

from revnet.errors import MissingDependencyError
from revnet.training import TrainConfig, resume, train
from revnet.training.run.loggers import describe_loggers, logger_errors
from tests.training.samples import TINY, read_log, stop_after_epoch


def make_config(folder: Path, **options) -> TrainConfig:
    options = {"model": TINY, "max_updates": 18, "log_every": 5, "drift_every": 5} | options
    return TrainConfig(device="cpu", out_dir=str(folder), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    logger = "tensorboard" if find_spec("tensorboard") else "csv"
    train(make_config(folder, logger=logger), quiet=True)
    return folder


def test_log_by_update(folder):
    rows = read_log(folder, "updates.csv")
    assert [int(row["update"]) for row in rows] == [5, 10, 15]
    assert [int(row["epoch"]) for row in rows] == [1, 1, 2]
    for row in rows:
        assert float(row["train_loss_step"]) > 0
        assert float(row["lr"]) > 0
        assert float(row["samples_per_second"]) > 0
        assert int(row["peak_bytes"]) > 0
        assert float(row["drift"]) > 0


def test_log_by_epoch_has_throughput_and_memory(folder):
    rows = read_log(folder)
    assert len(rows) == 2
    assert all(float(row["samples_per_second"]) > 0 and int(row["peak_bytes"]) > 0 for row in rows)


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_figures_by_update_and_by_epoch(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    by_update = events.Scalars("train_loss_step")
    assert [event.step for event in by_update] == [5, 10, 15]
    assert [event.value for event in by_update] == pytest.approx(
        [float(row["train_loss_step"]) for row in read_log(folder, "updates.csv")]
    )
    for name in ("train_loss", "val_loss", "train_accuracy", "val_accuracy"):
        assert len(events.Scalars(name)) == 2
    for name in ("lr", "samples_per_second", "peak_bytes", "drift"):
        assert len(events.Scalars(name)) >= 3


@pytest.mark.filterwarnings("default")  # MLflow and wandb use what other packages deprecate
@pytest.mark.skipif(not (find_spec("wandb") and find_spec("mlflow")), reason="wandb or mlflow is not installed")
def test_wandb_and_mlflow_go_on_with_their_runs(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    folder = tmp_path / "run"
    with monkeypatch.context() as stopping:
        stop_after_epoch(stopping, 1)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(folder, logger="wandb,mlflow"), quiet=True)
    names = json.loads((folder / "loggers.json").read_text())
    resume(folder, quiet=True)
    assert json.loads((folder / "loggers.json").read_text()) == names
    assert list((folder / "wandb").glob(f"offline-run-*-{names['wandb']}"))
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        runs = database.execute("select run_uuid from runs").fetchall()
        steps = database.execute("select step from metrics where key = 'train_loss_step' order by step").fetchall()
    assert runs == [(names["mlflow"],)]
    assert {step for (step,) in steps} == {5, 10, 15}


def test_rejects_unknown_and_missing_loggers(monkeypatch):
    with pytest.raises(ValueError, match=r"`logger` \(='csv,tensorbord'\) .*; did you mean `tensorboard`\?"):
        TrainConfig(logger="csv,tensorbord")
    monkeypatch.setattr("revnet.training.settings.checks.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"`logger` \(='mlflow'\) needs mlflow.*\[mlflow\]"):
        TrainConfig(logger="mlflow")


def test_error_of_a_logger_is_one_line():
    error = type("MlflowException", (Exception,), {"__module__": "mlflow.exceptions"})
    expected = r"`logger` \(='mlflow'\) failed: no connection; fix it, or leave mlflow out"
    with pytest.raises(ValueError, match=expected), logger_errors():
        raise error("no\nconnection")
    with pytest.raises(KeyError), logger_errors():
        raise KeyError("another")


def test_csv_alone_has_no_logger(tmp_path):
    assert describe_loggers(TrainConfig(logger="csv"), tmp_path) == []
