"""Build a command from a typed function: its parameters are the options, and its docstring is the help."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from revnet.cli._config_file import read_config
from revnet.cli._docstrings import describe_function
from revnet.cli._errors import UsageError
from revnet.cli._flag_names import name_flags
from revnet.cli._help import HelpFormatter
from revnet.cli._options import Option, list_options
from revnet.cli._values import describe_type, is_list, is_switch, read_text
from revnet.training.recipes import list_recipes
from revnet.training.settings.devices import explain_device

_PATHS = ("checkpoint", "csv", "data", "images", "jsonl", "out", "out_dir", "resume", "weights")
"""Options and arguments that are paths."""
_LONGEST_CHOICES = 40
"""Number of characters of all choices up to which they stand for the value in the help."""


def parse(function: Callable[..., Any], prog: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Read `arguments` as the parameters of `function`.

    `--some-name` and `--some_name` are the same option, and a later one overrides an earlier one. A function that
    takes settings (`takes_settings`) can also read them from YAML, by `--config FILE` or by the name of a recipe, and
    options override the file, wherever they stand. `--help` and `--print-config` print and exit.

    Returns:
        The values that were given. The others keep the defaults of the function.

    Raises:
        UsageError: An argument is unknown, missing or of the wrong type, or a YAML file is missing or broken.
    """
    parser = CommandParser(function, prog)
    try:
        given, unknown = parser.parse_known_args(_with_dashes(arguments))
    except argparse.ArgumentError as error:
        if error.argument_name is None:  # Newer releases of Python raise, where older ones call `error`.
            parser.error(error.message)
        # argparse reads text only, so this is the one mistake left.
        raise UsageError(
            f"`{error.argument_name}` needs a value; write one that begins with a dash as {error.argument_name}=VALUE."
        ) from error
    if unknown:
        raise UsageError(parser.explain_unknown(unknown))
    options = vars(given)
    values = options.pop("config", {}) | options
    _check_not_empty(values, parser)
    _check_model(values, parser)
    if values.pop("print_config", False):
        print(parser.format_config(values), end="")
        raise SystemExit(0)
    return values


def _check_not_empty(values: dict[str, Any], parser: "CommandParser") -> None:
    """Raise if a path is empty, which would stand for the current folder."""
    for option in parser.known:
        value = values.get(option.name)
        if option.name in _PATHS and (value == "" or (isinstance(value, list) and "" in value)):
            raise UsageError(f"`{option.word}` (='') must not be empty; pass a path, such as . for the current folder.")


def _check_model(values: dict[str, Any], parser: "CommandParser") -> None:
    """Raise if the model is the name of a recipe."""
    name = values.get("model")
    if name is None or name not in list_recipes() or Path(name).exists():
        return
    (option,) = (option for option in parser.known if option.name == "model")
    way_out = f"`--config {name}`, or " if option.is_setting else ""
    raise UsageError(f"`{option.word}` (={name}) is a recipe, not a model; pass {way_out}{name.rpartition('/')[2]}.")


class CommandParser(argparse.ArgumentParser):
    """The parser of a command.

    Args:
        function: Function of the command.
        prog: The command as it is typed.
    """

    def __init__(self, function: Callable[..., Any], prog: str) -> None:
        self.known = list_options(function)
        self.positional = [option for option in self.known if option.is_required]
        words = [option.name.upper() + "..." * option.takes_many for option in self.positional]
        super().__init__(
            prog=prog,
            usage=" ".join([prog, *words, "[options]"]),
            description=describe_function(function),
            formatter_class=HelpFormatter,
            argument_default=argparse.SUPPRESS,
            exit_on_error=False,
            allow_abbrev=False,
        )
        # Titles of argparse, which differ between releases of Python.
        self._positionals.title, self._optionals.title = "arguments", "options"
        if any(option.is_setting for option in self.known):
            self.add_argument(
                "--config",
                action=_ReadConfig,
                help="YAML file with values for the settings below, or the name of a recipe, as in configs/.",
            )
            self.add_argument("--print-config", action="store_true", help="Print all settings as YAML and exit.")
        groups = {
            title: self.add_argument_group(title) for title in dict.fromkeys(o.group for o in self.known) if title
        }
        for option in self.known:
            text = name_flags(option.help, self.known)
            _add_option(self if option.group is None else groups[option.group], replace(option, help=text))

    def error(self, message: str) -> NoReturn:
        """Raise the only error that argparse reports here: a positional argument is missing."""
        names = message.rpartition(": ")[2].split(", ")
        words = " and ".join(f"`{name.upper()}`" for name in names)
        raise UsageError(f"{words} {'is' if len(names) == 1 else 'are'} missing; `{self.prog} --help` explains it.")

    def explain_unknown(self, unknown: Sequence[str]) -> str:
        """Return a message about arguments that match no option."""
        if unknown[0].startswith("-"):
            name = unknown[0].partition("=")[0]
            return f"unknown option `{name}`{self.hint(name)}"
        many = [option.name.upper() for option in self.positional if option.takes_many]
        if many:
            words = " ".join(word for word in unknown if not word.startswith("-"))
            return f"`{words}` is separated from the other {many[0]}; write them one after the other."
        return f"`{unknown[0]}` needs an option before it; `{self.prog} --help` lists them all."

    def hint(self, name: str) -> str:
        """Return the option closest to `name`, as the end of a sentence."""
        flags = [option.flag for option in self.known if not option.is_required]
        close = difflib.get_close_matches("--" + name.lstrip("-").replace("_", "-"), flags, n=1)
        return f"; did you mean `{close[0]}`?" if close else f"; `{self.prog} --help` lists them all."

    def format_config(self, given: dict[str, Any]) -> str:
        """Return all settings as YAML, given or by default."""
        import yaml

        values = {option.name: given.get(option.name, option.default) for option in self.known if option.is_setting}
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return yaml.safe_dump(lists, sort_keys=False)


def _add_option(group: Any, option: Option) -> None:
    if option.is_required:
        group.add_argument(option.name, nargs="+" if option.takes_many else None, help=option.help)
        return
    metavar = "[X,...]" if is_list(option.kind) else option.name.upper()
    text = option.help
    if option.choices and sum(map(len, option.choices)) < _LONGEST_CHOICES:
        metavar = "{" + ",".join(option.choices) + "}"
    elif option.choices:
        text += f" One of {', '.join(option.choices)}."
    default = "" if option.default is None else f" (default: {_spell(option.default)})"
    group.add_argument(
        option.flag,
        dest=option.name,
        action=_ReadValue,
        kind=option.kind,
        nargs="?" if is_switch(option.kind) else None,
        const="true",
        metavar=metavar,
        help=(text + default).replace("%", "%%"),
    )


class _ReadValue(argparse.Action):
    """Reads the text of an option as a value of its type."""

    def __init__(self, *args: Any, kind: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kind = kind

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        values = _one_text(values)
        try:
            value = read_text(values, self.kind)
        except TypeError as error:
            hint = explain_device(self.dest, values)
            if hint is not None:
                raise UsageError(hint) from error
            raise UsageError(f"`{option_string}` (={values}) must be {describe_type(self.kind, self.dest)}.") from error
        setattr(namespace, self.dest, value)


class _ReadConfig(argparse.Action):
    """Reads a file of settings, which options override; a later file overrides an earlier one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        kinds = {option.name: option.kind for option in parser.known if not option.is_required}
        settings = read_config(_one_text(values), kinds, parser.hint)
        namespace.config = getattr(namespace, "config", {}) | settings


def _one_text(values: Any) -> str:
    """Return the text of an option, from which argparse removes `--`: `--epochs=--` leaves an empty list."""
    return values if isinstance(values, str) else "--"


def _with_dashes(arguments: Sequence[str]) -> list[str]:
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    spelled = []
    for argument in arguments[:end]:
        flag, equals, value = argument.partition("=")
        spelled.append(flag.replace("_", "-") + equals + value if flag.startswith("--") else argument)
    return [*spelled, *arguments[end:]]


def _spell(value: Any) -> str:
    if isinstance(value, tuple):
        return str(list(value)).replace(" ", "")
    return repr(value) if isinstance(value, str) and not value.strip() else str(value).lower()
