"""`revnet --print-completion`: completion of commands and options in a shell, by shtab."""

import argparse
from importlib import import_module
from typing import Any, Literal, get_args

from revnet.cli._commands import COMMANDS, COMPLETION, SUBCOMMANDS
from revnet.cli._errors import UsageError
from revnet.cli._options import Option
from revnet.cli._parser import CommandParser
from revnet.errors import MissingDependencyError
from revnet.training.recipes import list_recipes

Shell = Literal["bash", "zsh", "tcsh"]

_FOLDERS = {"out_dir", "resume"}
_FILES = {"checkpoint", "model", "config", "csv", "data", "images", "out", "weights"}


def completion(shell: Shell) -> None:
    """Print the script that completes commands and options in a shell.

    Examples:
        revnet --print-completion bash > ~/.local/share/bash-completion/completions/revnet
        revnet --print-completion zsh > ~/.zfunc/_revnet

    Args:
        shell: Shell: bash, zsh or tcsh.
    """
    if shell not in get_args(Shell):
        raise UsageError(f"`SHELL` (={shell}) must be bash, zsh or tcsh.")
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of("shtab", "`--print-completion`") from error
    print(shtab.complete(_make_parser(shtab), shell))


def _make_parser(shtab: Any) -> argparse.ArgumentParser:
    """Return the parser of all commands; each command reads its own arguments when it runs."""
    parser = argparse.ArgumentParser(prog="revnet", description="Reversible residual networks.")
    parser.add_argument("--version", action="store_true", help="show the version")
    parser.add_argument(COMPLETION, choices=get_args(Shell), help="print the completion script of a shell")
    group = parser.add_subparsers(parser_class=CommandParser)
    for name, summary in COMMANDS.items():
        command = _add_command(shtab, group, name, name, summary)
        if name in SUBCOMMANDS:
            nested = command.add_subparsers(parser_class=CommandParser)
            for word in SUBCOMMANDS[name]:
                _add_command(shtab, nested, word, f"{name}_{word}", f"{name} {word}")
    return parser


def _add_command(shtab: Any, group: Any, word: str, name: str, summary: str) -> CommandParser:
    function = getattr(import_module(f"revnet.cli.{name}"), name)
    parser: CommandParser = group.add_parser(word, function=function, help=summary)
    options = {option.name: option for option in parser.known}
    for action in parser._actions:  # argparse has no other way to list them
        _complete_values(shtab, action, options.get(action.dest), takes_runs=name == "doctor")
    return parser


def _complete_values(shtab: Any, action: Any, option: Option | None, *, takes_runs: bool) -> None:
    words = () if option is None else option.choices
    if action.dest == "model" and not takes_runs:
        from revnet.models import list_models

        words = tuple(list_models())
    if action.dest == "config":
        words = tuple(list_recipes())
    if words:
        action.choices = words
    elif action.dest in _FOLDERS:
        action.complete = shtab.DIRECTORY
    elif action.dest in _FILES:
        action.complete = shtab.FILE
