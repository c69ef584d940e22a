"""From a typed function to a command: its parameters are the flags, its docstring is the help."""

from __future__ import annotations

import difflib
import inspect
import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from revnet.training.recipes import find_recipe

_TYPES = {
    "bool": "true or false",
    "float": "a number",
    "int": "an integer",
    "NoneType": "null",
    "str": "text",
    "tuple": "a list in brackets, such as [0.5,0.75]",
}


class UsageError(ValueError):
    """The arguments do not fit the command."""


def parse(function: Callable[..., Any], prog: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Read `arguments` as the parameters of `function`.

    `--some-name` and `--some_name` are the same flag, and a later one overrides an earlier one. A function that takes
    `**settings` can also read them from YAML, by `--config FILE` or by the name of a recipe; `--help` and
    `--print-config` print and exit.

    Returns:
        The values that were given; what was not is the function's default.

    Raises:
        UsageError: An argument is unknown, missing or of the wrong type, or a YAML file is missing or broken.
    """
    parser = _make_parser(function, prog)
    spelled = _with_recipes([_with_underscores(argument) for argument in arguments])
    try:
        parser.parse_args(spelled)  # for --print-config, which prints the defaults too
        given = parser.parse_args(spelled, defaults=False)
    except jsonargparse.ArgumentError as error:
        raise UsageError(_explain(str(error), parser, arguments)) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"`--config` ({_config_file(arguments)}) is not a text file; pass a YAML file.") from error
    return {name: value for name, value in given.as_dict().items() if name != "config"}


class _HelpFormatter(RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Keep the paragraphs of the docstring."""


class _Parser(jsonargparse.ArgumentParser):
    def format_help(self, *args: Any) -> str:
        """Spell flags with dashes; they are parsed with the underscores of Python and YAML."""
        return re.sub(r"--[a-z_]+", lambda match: match[0].replace("_", "-"), super().format_help(*args))


def _make_parser(function: Callable[..., Any], prog: str) -> _Parser:
    # The sentence beneath a dataclass field is the help of its flag.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    description = inspect.cleandoc(function.__doc__ or "").partition("\nArgs:")[0]
    parser = _Parser(
        prog=prog,
        usage=_usage(function),
        description=description,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
    )
    has_settings = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    if has_settings:
        parser.add_argument(
            "--config",
            action="config",
            help="YAML file with values for the options below, or a recipe, such as cifar10/paper/revnet38.",
        )
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:
            action.nargs, action.const = "?", "true"  # `--quick` is `--quick true`
        if not action.option_strings and getattr(action, "_typehint", None) == list[str]:
            # As many words as there are, each as it was written: jsonargparse would read one word as a list.
            action.nargs, action._typehint, action.metavar = "+", str, action.dest  # type: ignore[attr-defined]
    return parser


def _usage(function: Callable[..., Any]) -> str:
    positional = [
        name.upper() + "..." * str(p.annotation).startswith("list")
        for name, p in inspect.signature(function).parameters.items()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    return " ".join(["%(prog)s", *positional, "[options]"])


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _with_recipes(arguments: list[str]) -> list[str]:
    """Put the file of a recipe in place of its name."""
    found = list(arguments)
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag != "--config":
            continue
        if not equals and index + 1 < len(arguments):
            found[index + 1] = _recipe_file(arguments[index + 1])
        elif equals:
            found[index] = f"--config={_recipe_file(value)}"
    return found


def _recipe_file(name: str) -> str:
    is_file = Path(name).suffix in (".yaml", ".yml") or Path(name).exists()
    return name if is_file else str(find_recipe(name))


def _explain(message: str, parser: _Parser, arguments: Sequence[str]) -> str:
    """Put what jsonargparse says, often over several lines, into one line that names flag, value and rule."""
    if match := re.match(r'Parser key "(\w+)":\s+(?:Expected|Does not validate)', message):
        value = re.search(r"(?:Got|Given) value: (.*)", message)
        types = re.findall(r"Expected an? <class '(\w+)'>", message)
        rules = [*_choices(message), *(_TYPES.get(name, name) for name in types)] or ["of another type"]
        return f"`{_flag(match[1])}` (={value[1] if value else ''}) must be {' or '.join(rules)}."
    if re.match("Option 'task' is not accepted", message):
        return (
            f"`--config` ({_config_file(arguments)}) is for another task; its `task` says which: `revnet train TASK`."
        )
    if match := re.match(r"Option '(\w+)' is not accepted", message):
        return f"`--config` ({_config_file(arguments)}) has the unknown setting `{match[1]}`{_hint(match[1], parser)}"
    if match := re.match(r"unrecognized arguments: (--[\w-]+)", message):
        return f"unknown option `{match[1].replace('_', '-')}`{_hint(match[1], parser)}"
    many = [action.dest.upper() for action in parser._actions if action.nargs == "+"]
    if many and (match := re.match(r"unrecognized arguments: ([^-].*)", message)):
        return f"`{match[1]}` stands apart from the other {many[0]}; write them one after the other."
    if match := re.match(r"unrecognized arguments: ([^-].*)", message):
        return f"`{match[1]}` needs an option before it; `{parser.prog} --help` lists them all."
    if match := re.match(r"argument (--\w+): expected one argument", message):
        return f"`{_flag(match[1])}` needs a value."
    if match := re.match(r'Parser key "config": (File does not exist|Path is not a file)', message):
        return f"`--config` ({_config_file(arguments)}): {match[1].lower()}; pass a YAML file."
    if message.startswith("Unexpected config"):
        return f"`--config` ({_config_file(arguments)}) must hold one `setting: value` per line."
    if message.startswith("Problems parsing config"):
        return f"`--config` ({_config_file(arguments)}) is not valid YAML: {_one_line(message.partition(': ')[2])}."
    return _one_line(message)


def _choices(message: str) -> list[str]:
    match = re.search(r"Literal\[(.*?)\]", message)
    return [f"`{choice}`" for choice in re.findall(r"'(.*?)'", match[1])] if match else []


def _hint(name: str, parser: _Parser) -> str:
    known = [action.dest for action in parser._actions if action.option_strings]
    close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1)
    return f"; did you mean `{_flag(close[0])}`?" if close else f"; `{parser.prog} --help` lists them all."


def _flag(name: str) -> str:
    return "--" + name.lstrip("-").replace("_", "-")


def _config_file(arguments: Sequence[str]) -> str:
    joined = " ".join(arguments)
    match = re.search(r"--config[= ](\S+)", joined)
    return match[1] if match else "YAML"


def _one_line(text: str) -> str:
    return " ".join(text.split())
