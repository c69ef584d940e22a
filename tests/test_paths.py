import os
from pathlib import Path

import pytest

from revnet._paths import absolute_path, expand_user
from revnet.cli.main import main

UNKNOWN = "~no-such-user"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_home_directory(home):
    assert expand_user("~/run") == expand_user(Path("~/run")) == home / "run"
    assert expand_user("run/~") == Path("run/~")


def test_an_unknown_user_is_part_of_the_name():
    assert expand_user(f"{UNKNOWN}/run") == Path(UNKNOWN, "run")
    assert absolute_path(UNKNOWN) == os.path.realpath(UNKNOWN)


def test_an_absolute_path_follows_links(home):
    (home / "link").symlink_to("loop")
    (home / "loop").symlink_to("link")
    (home / "other").symlink_to("run")
    assert absolute_path("~/other") == os.path.realpath(home / "run")
    assert absolute_path("~/loop/x") == os.path.realpath(home / "loop/x")


@pytest.mark.parametrize(
    "line",
    [
        "train --data {}/photos",
        "train --data digits --weights {}/best.safetensors",
        "train --config {}/settings.yaml",
        "train --resume {}/run",
        "train lm --data {}/rhyme.txt",
        "evaluate {}/run",
        "predict revnet38.digits {}/photo.png",
        "sample {}/run",
        "doctor {}/run",
        "export {}/run",
    ],
)
def test_reading_from_an_unknown_user_says_what_is_missing(line, capsys):
    assert main(line.format(UNKNOWN).split()) in (1, 2)
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert UNKNOWN in message
    assert "does not exist" in message or "no such file" in message


def test_writing_to_an_unknown_user_makes_a_folder_as_a_shell_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["train", "nice", "--epochs", "1", "--out-dir", f"{UNKNOWN}/run"])
    assert (tmp_path / UNKNOWN / "run" / "config.yaml").is_file()
