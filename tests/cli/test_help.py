"""Help texts fit the terminal, break no word, and say what is the default."""

import re

import pytest

from revnet.cli.main import main
from tests.cli.random_lines import FUNCTIONS

COMMANDS = [[], *([*name.split("_", 1)] for name in FUNCTIONS)]


def help_of(command, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([*command, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 80, 110, 200])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_the_terminal_and_breaks_no_word(command, width, monkeypatch, capsys):
    text = help_of(command, width, monkeypatch, capsys)
    assert max(map(len, text.splitlines())) < width
    widest = help_of(command, 10_000, monkeypatch, capsys)
    assert set(text.split()) - {"\\"} == set(widest.split()) - {"\\"}


def test_help_uses_a_wide_terminal_up_to_a_readable_width(monkeypatch, capsys):
    assert 110 < max(map(len, help_of(["plan"], 200, monkeypatch, capsys).splitlines())) <= 120


@pytest.mark.parametrize("width", ["0", "1", "20", "-3", "x"])
def test_help_of_a_terminal_without_a_sensible_width(width, monkeypatch, capsys):
    assert "--epochs" in help_of(["train"], width, monkeypatch, capsys)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_no_word_of_yaml_and_no_parameter(command, monkeypatch, capsys):
    text = help_of(command, 110, monkeypatch, capsys)
    assert not re.search(r"\bnull\b", text, re.IGNORECASE)
    assert re.findall(r"`[a-z]+(?:_[a-z]+)+`", text) in ([], ["`mean_image`", "`unit_range`"])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_option_says_its_default(name, monkeypatch, capsys):
    text = help_of(name.split("_", 1), 110, monkeypatch, capsys)
    entries = re.split(r"^  (?=--)", text.partition("\noptions:\n")[2], flags=re.MULTILINE)[1:]
    silent = [entry.split()[0] for entry in entries if "default" not in entry]
    assert set(silent) <= SILENT


SILENT = {
    *(
        "--config",
        "--print-config",
        "--resume",
        "--csv",
        "--jsonl",
        "--largest",
        "--inpaint",
        "--top-k",
        "--top-p",
        "--tolerance",
    ),
    *("--budget", "--data", "--devices", "--strategy", "--input-shape", "--memory-budget"),
}
"""Options that change nothing unless they are given, or whose help says when they are required."""


def test_examples_of_a_narrow_terminal_are_valid_commands(monkeypatch, capsys):
    text = help_of(["train"], 60, monkeypatch, capsys)
    example = "revnet train --config cifar10/quick/revnet38 \\\n        --data path/to/cifar-10-python.tar.gz\n"
    assert example in text
