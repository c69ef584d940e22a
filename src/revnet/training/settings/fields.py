"""Fields of settings that carry their rules, and the groups that they form."""

import operator
import os
from collections.abc import Callable
from dataclasses import field, fields
from functools import partial
from inspect import get_annotations
from numbers import Real
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args, get_origin

from revnet.training.settings.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_name,
    check_number,
    is_index,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Check = Callable[[str, Any], object]
"""Function that raises unless the setting of that name may have that value."""


class SettingsGroup:
    """Settings of one subject, as the base of a dataclass.

    The settings of a family of training derive from several groups. A class that has rules about several settings
    together states them in `_check_together`, which is called for each class.
    """

    title: ClassVar[str]
    """Heading of the group in the help of a command."""

    def check(self) -> None:
        """Raise unless each setting keeps its rule, and all of them go together."""
        for setting in fields(cast("DataclassInstance", self)):
            value = plain_value(getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)
            check_setting(setting.name, setting.type, value, setting.metadata.get("check"))
        for group in reversed(type(self).__mro__):
            if "_check_together" in vars(group):
                vars(group)["_check_together"](self)


def plain_value(value: Any) -> Any:
    """Return a setting as Python's own type, which YAML can hold: NumPy's numbers and paths become plain ones."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, str):
        return str.__str__(value)  # `str` would print the name of an enum
    if isinstance(value, list | tuple):
        values = [plain_value(each) for each in value]
        return tuple(values) if isinstance(value, tuple) else values
    if type(value).__name__ in ("bool", "bool_"):  # Python's, and the ones of NumPy
        return bool(value)
    if is_index(value):
        return operator.index(value)
    if isinstance(value, Real):
        return float(value)
    return value


def list_groups(settings: type) -> dict[str, list[str]]:
    """Return the names of all settings by the title of the group that defines them, the settings' own first."""
    names = {setting.name for setting in fields(cast("type[DataclassInstance]", settings))}
    groups = [base for base in settings.__mro__ if issubclass(base, SettingsGroup) and "title" in vars(base)]
    # A class that only changes the default or the description of a setting leaves it in its group.
    group_of = {name: group for group in groups for name in get_annotations(group) if name in names}
    return {group.title: [name for name in get_annotations(group) if group_of.get(name) is group] for group in groups}


def integer(default: int | None, *, at_least: int, at_most: int | None = None) -> Any:
    """Return a dataclass field for an integer in a range."""
    return checked(default, partial(check_integer, at_least=at_least, at_most=at_most))


def number(default: float | None, rule: str, holds: Callable[[float], bool], *, usual: str) -> Any:
    """Return a dataclass field for a finite number.

    Args:
        default: Value of a setting that is left out.
        rule: The rule in words, such as "above 0".
        holds: The rule as a function.
        usual: A usual value, for the error message.
    """
    return checked(default, partial(check_number, rule=rule, holds=holds, advice=f"{usual} is usual"))


def checked(default: Any, check: Check) -> Any:
    """Return a dataclass field that `check` is called for."""
    return field(default=default, metadata={"check": check})


def check_setting(name: str, kind: Any, value: Any, check: Check | None) -> None:
    """Raise unless `value` suits the field: its type `kind`, and its `check` if it has one."""
    is_optional = NoneType in get_args(kind)
    if is_optional and value is None:
        return
    if check is not None:
        check(name, value)
    if is_optional:
        options = [option for option in get_args(kind) if option is not NoneType]
        kind = options[0] if len(options) == 1 else Any  # the check knows what else it may be
    if get_origin(kind) is Literal:
        check_choice(name, value, get_args(kind))
    elif kind is bool:
        check_flag(name, value, is_optional=is_optional)
    elif kind is str:
        check_name(name, value)
