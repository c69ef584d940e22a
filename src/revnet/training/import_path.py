"""Models and data of the user's own, by their import path."""

import difflib
import inspect
import sys
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

FORM = "package.module:attribute"
"""Form of an import path."""


class UserCodeError(Exception):
    """The user's own code failed; the error that it raised is the cause."""


def is_import_path(name: str) -> bool:
    """Return whether `name` is the import path of the user's own object, not a name or a path of files."""
    return ":" in name and not name.startswith("hub:") and not Path(name).exists()


def import_object(name: str, subject: str, *, example: str = "") -> Any:
    """Import the object at the path `package.module:attribute`, from the current directory too.

    Args:
        name: The path.
        subject: The path or the setting as the subject of an error message.
        example: An example of a path, for the error message.

    Raises:
        ValueError: The path has another form, or nothing is there.
        UserCodeError: The module failed while it was imported.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or module_name.endswith(".py") or "/" in name or "\\" in name:
        such_as = f", such as {example}" if example else ""
        raise ValueError(f"{subject} must be written {FORM}{such_as}, without `/` or `.py`.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{subject}: no module `{error.name}` is installed or in the current directory."
            ) from error
        raise UserCodeError(f"{subject}: importing `{module_name}` failed.") from error
    except (Exception, SystemExit) as error:
        raise UserCodeError(f"{subject}: importing `{module_name}` failed.") from error
    try:
        return reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        close = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean `{close[0]}`?" if close else "."
        raise ValueError(f"{subject}: `{module_name}` has no `{attribute}`{hint}") from error


def call_object(setting: str, name: str, function: Callable[..., Any], **offered: Any) -> Any:
    """Call the user's function with those of the arguments that it takes by name.

    Raises:
        UserCodeError: The function failed.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        names = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
        return function(**{key: value for key, value in offered.items() if takes_all or key in names})
    except (Exception, SystemExit) as error:
        raise UserCodeError(f"`{setting}` (={name!r}) failed when it was called.") from error
