import re
import sys

import pytest

from revnet.training import TrainConfig, train
from revnet.training.run.progress import EpochLines, RunBar, make_progress


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
    train(TrainConfig(epochs=2, batch_size=400, out_dir=out_dir))
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
        r"epoch 2/2  loss \d\.\d{4}  validation accuracy \d+\.\d\d %  [\d,]+ images/s  \d+\.\d s", lines[-1]
    )


def test_terminal_shows_one_bar_for_the_whole_run(out_dir, capfd, monkeypatch):
    monkeypatch.setattr("revnet.training.run.execute.make_progress", RunBar)
    train(TrainConfig(epochs=2, batch_size=400, out_dir=out_dir))
    output, errors = capfd.readouterr()
    assert errors == ""
    assert len(re.findall("epoch 2/2.*100%.*loss.*validation", output)) == 1


def test_quiet_prints_nothing(out_dir, capfd):
    train(TrainConfig(epochs=1, batch_size=1000, out_dir=out_dir), quiet=True)
    assert capfd.readouterr() == ("", "")
