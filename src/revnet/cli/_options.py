"""The options of a command, from the signature of its function."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from revnet.cli._docstrings import describe_arguments, describe_fields
from revnet.cli._values import choices, is_switch, takes_choices_only
from revnet.training.settings.fields import list_groups

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """An option or a positional argument."""

    name: str
    """Name of the parameter."""
    kind: Any
    """Type of the parameter."""
    help: str
    """Sentence of the docstring about it."""
    default: Any
    """Default value; `inspect.Parameter.empty` if the argument is required."""
    group: str | None = None
    """Title of its group, if it is a field of the settings, which a YAML file can hold."""

    @property
    def is_setting(self) -> bool:
        """Whether the option is a field of the settings."""
        return self.group is not None

    @property
    def is_required(self) -> bool:
        """Whether the argument is positional and has no default."""
        return self.default is inspect.Parameter.empty

    @property
    def takes_many(self) -> bool:
        """Whether the argument takes one word or more."""
        return self.is_required and self.kind == list[str]

    @property
    def flag(self) -> str:
        """The option as it is written on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that the option takes, if only these: of a `Literal`, or of a switch."""
        if takes_choices_only(self.kind):
            return choices(self.kind)
        return ("true", "false") if is_switch(self.kind) else ()

    @property
    def word(self) -> str:
        """The option or positional argument as the help writes it."""
        return self.name.upper() if self.is_required else self.flag


def takes_settings(settings: type) -> Callable[[_Function], _Function]:
    """Declare that a command's `**settings` are the fields of the dataclass `settings`, each with a default."""

    def declare(function: _Function) -> _Function:
        function.settings_type = settings  # type: ignore[attr-defined]
        return function

    return declare


def list_options(function: Callable[..., Any]) -> list[Option]:
    """Return the options of a command in the order of its help."""
    kinds, sentences = get_type_hints(function), describe_arguments(function)
    options = [
        Option(name, kinds[name], sentences.get(name, ""), parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    settings: Any = getattr(function, "settings_type", None)
    if settings is None:
        return options
    kinds, sentences = get_type_hints(settings), describe_fields(settings)
    defaults = settings()
    own = {option.name for option in options}  # a parameter of the command hides the setting of its name
    return options + [
        Option(name, kinds[name], sentences.get(name, ""), getattr(defaults, name), title)
        for title, names in list_groups(settings).items()
        for name in names
        if name not in own
    ]
