"""Settings from a YAML file, for `--config`."""

from collections.abc import Callable, Mapping
from typing import Any

from revnet._documents import read_yaml
from revnet._paths import expand_user
from revnet.cli._errors import UsageError
from revnet.cli._values import check_value, describe_type
from revnet.training.recipes import find_recipe


def read_config(name: str, kinds: Mapping[str, Any], hint: Callable[[str], str]) -> dict[str, Any]:
    """Read a file of settings.

    Args:
        name: Path of a YAML file, or the name of a recipe.
        kinds: Type of each setting.
        hint: Says which setting an unknown one may mean.

    Raises:
        UsageError: The file is missing or broken, or holds an unknown setting or a value of the wrong type.
    """
    settings = _load(name)
    values = {}
    for setting, value in settings.items():
        if setting == "task" and "task" not in kinds:
            raise UsageError(f"`--config` ({name}) is for another task; its `task` says which: `revnet train TASK`.")
        if setting not in kinds:
            raise UsageError(f"`--config` ({name}) has the unknown setting `{setting}`{hint(str(setting))}")
        try:
            values[setting] = check_value(value, kinds[setting])
        except TypeError as error:
            flag = "--" + setting.replace("_", "-")
            rule = describe_type(kinds[setting], setting)
            raise UsageError(f"`{flag}` (={value}) must be {rule}.") from error
    return values


def _load(name: str) -> dict[Any, Any]:
    path = expand_user(name)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        try:
            path = find_recipe(name)
        except ValueError as error:
            raise UsageError(str(error)) from error
    if not path.is_file():
        fault = "path is not a file" if path.exists() else "file does not exist"
        raise UsageError(f"`--config` ({name}): {fault}; pass a YAML file.")
    try:
        return read_yaml(path, f"`--config` ({name})")
    except OSError as error:
        raise UsageError(f"`--config` ({name}) cannot be read: {error.strerror}; pass a YAML file.") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
