"""Values of options, read from text and from YAML."""

import argparse
import re
from importlib import import_module
from typing import Literal

import pytest

from revnet.cli._commands import COMMANDS
from revnet.cli._options import list_options
from revnet.cli._values import check_value, describe_type, is_list, read_text

Color = Literal["red", "32-true"]


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("1e-3", float, 0.001),
        ("3", float, 3.0),
        ("-3", int, -3),
        ("010", int, 10),
        ("008", int | None, 8),
        ("010", float, 10.0),
        ("1_000", int, 1000),
        ("+5", int, 5),
        ("-.5", float, -0.5),
        ("2e3", float, 2000.0),
        ("true", bool, True),
        ("null", int | None, None),
        ("null", str, "null"),
        ("null", str | None, None),
        ("1.0", str, "1.0"),
        ("[a]", str | None, "[a]"),
        ("32-true", Color, "32-true"),
        ("[0.5,0.75]", tuple[float, ...], (0.5, 0.75)),
        ("[1, 2]", tuple[float, float] | None, (1.0, 2.0)),
    ],
)
def test_reads_text(text, kind, value):
    assert read_text(text, kind) == value
    assert type(read_text(text, kind)) is type(value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("1.5", int),
        ("true", int),
        ("9" * 5000, int),
        ("0x10", int),
        ("1:30", int),
        ("1:30", float),
        ("0b1", int),
        ("0x10", float),
        ("nan", float),
        ("1e999", float),
        ("yes please", bool),
        ("blue", Color),
        ("0.5", tuple[float, ...]),
        ("[1]", tuple[float, float]),
        ("[a: b: c", int),
    ],
)
def test_rejects_text_of_another_type(text, kind):
    with pytest.raises(TypeError):
        read_text(text, kind)


def test_checks_yaml():
    assert check_value("1e-3", float) == 0.001
    assert check_value([1, 2], tuple[int, ...]) == (1, 2)
    for value, kind in ((5, str), ("5", int), (True, float), ({}, tuple[int, ...])):
        with pytest.raises(TypeError):
            check_value(value, kind)


def test_describes_types():
    assert describe_type(int | None) == "an integer or null"
    assert describe_type(Color | None) == "`red` or `32-true` or null"
    assert describe_type(tuple[float, ...], "decay_at") == "a list in brackets, such as [0.5,0.75]"
    shapes = tuple[int, ...] | tuple[tuple[int, ...], ...] | None
    assert describe_type(shapes, "input_shape") == "a list in brackets, such as [3,64,64], or null"


@pytest.mark.parametrize("command", [*COMMANDS, "train_nice", "train_lm"])
def test_example_of_every_list_is_one(command):
    """The example that a message gives for an option is a value of that option."""
    function = getattr(import_module(f"revnet.cli.{command}"), command)
    for option in list_options(function):
        if is_list(option.kind):
            example = re.search(r"such as (\[.*?\])(,|$)", describe_type(option.kind, option.name))
            assert example is not None, f"{option.flag} has no example"
            read_text(example[1], option.kind)


def test_missing_argument_on_newer_releases_of_python(revnet, monkeypatch):
    def parse_known_args(*args):
        raise argparse.ArgumentError(None, "the following arguments are required: checkpoint")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    code, _, errors = revnet("export")
    assert code == 2
    assert errors == "revnet export: error: `CHECKPOINT` is missing; `revnet export --help` explains it.\n"
