import re
import sys

import pytest

from revnet.training import TrainConfig, train
from revnet.training.run.progress import EpochLines, RunBar, make_progress
from tests.training.samples import TINY


@pytest.mark.parametrize(
    ("is_terminal", "variables", "expected"),
    [
        (True, {}, RunBar),
        (False, {}, EpochLines),
        (True, {"CI": "true"}, EpochLines),
        (True, {"TERM": "dumb"}, EpochLines),
    ],
)
def test_bar_is_for_terminals_only(monkeypatch, is_terminal, variables, expected):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    assert type(make_progress()) is expected


def test_other_output_gets_a_heading_and_a_line_per_epoch(out_dir, capfd):
    train(TrainConfig(model=TINY, epochs=2, batch_size=400, out_dir=out_dir))
    output, errors = capfd.readouterr()
    assert errors == ""
    lines = output.splitlines()
    assert [line.split()[0] for line in lines] == [
        "revnet",
        "model",
        "data",
        "epochs",
        "device",
        "folder",
        "epoch",
        "epoch",
    ]
    assert "1,293 train, 144 validate, 360 test" in lines[2]
    assert re.fullmatch(
        r"epoch 2/2  loss \d\.\d{4} nats/image  validation accuracy \d+\.\d\d %  [\d,]+ images/s  \d+\.\d m?s",
        lines[-1],
    )


def test_terminal_keeps_a_line_per_epoch_above_one_bar(out_dir, capfd, monkeypatch):
    monkeypatch.setattr("revnet.training.run.execute.make_progress", RunBar)
    train(TrainConfig(model=TINY, epochs=2, batch_size=400, out_dir=out_dir))
    output, errors = capfd.readouterr()
    assert errors == ""
    assert len(re.findall(r"epoch 1/2  loss .* images/s  ", output)) == 1
    assert len(re.findall(r"epoch 2/2  loss .* images/s  ", output)) == 1
    assert len(re.findall("epoch 2/2.*100%", output)) == 1


def test_other_output_gets_lines_within_a_long_epoch(out_dir, capfd, monkeypatch):
    monkeypatch.setattr("revnet.training.run.execute.make_progress", lambda: EpochLines(interval_seconds=0))
    train(TrainConfig(model=TINY, epochs=1, batch_size=400, out_dir=out_dir))
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("epoch 1/1")]
    starts = ["batch 1/3", "batch 2/3", "batch 3/3", "validation batch 1/1", "loss "]
    assert len(lines) == len(starts)
    assert all(line.startswith(f"epoch 1/1  {start}") for line, start in zip(lines, starts, strict=True))
    for line in lines[:3]:
        assert re.fullmatch(r"epoch 1/1  batch \d/3  loss \d\.\d{4} nats/image  [\d,]+ images/s", line)


def test_short_epochs_get_no_other_lines(out_dir, capfd):
    train(TrainConfig(model=TINY, epochs=1, batch_size=400, out_dir=out_dir))
    assert capfd.readouterr().out.count("\nepoch 1/1") == 1


def test_quiet_prints_nothing(out_dir, capfd):
    train(TrainConfig(model=TINY, epochs=1, batch_size=1000, out_dir=out_dir), quiet=True)
    assert capfd.readouterr() == ("", "")
