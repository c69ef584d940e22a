"""Values of options: read from the command line or YAML, and checked against the type of a parameter."""

import math
import re
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from revnet._documents import parse_yaml

_DESCRIPTIONS = {
    bool: "true or false",
    float: "a number",
    int: "an integer",
    NoneType: "null",
    str: "text",
    tuple: "a list in brackets",
}
_LIST_EXAMPLES = {
    "class_weights": "[1,2.5]",
    "crop_area": "[0.08,1]",
    "decay_at": "[0.5,0.75]",
    "dims": "[2,3,4]",
    "input_dtype": "[float32,int64]",
    "input_shape": "[3,64,64]",
}
"""Lists as they are written on the command line, by the name of the option."""


_WHOLE = re.compile(r"[+-]?\d[\d_]*")


def read_text(text: str, kind: Any) -> Any:
    """Convert `text` from the command line to a value of the type `kind`.

    Raises:
        TypeError: `text` does not describe a value of that type.
    """
    members = _members(kind)
    if str in members:
        return None if text == "null" and NoneType in members else text
    if text in choices(kind):
        return text
    try:
        value = parse_yaml(text)
    except ValueError:
        value = text
    if type(value) in (int, float) or (int in members and _WHOLE.fullmatch(text)):
        value = _read_decimal(text)
    return check_value(value, kind)


def _read_decimal(text: str) -> int | float:
    """Read a number as Python does. YAML would read 010 as 8, and 1:30 as 90.

    Raises:
        TypeError: It is not a decimal number.
    """
    text = text.strip()
    try:
        return int(text) if _WHOLE.fullmatch(text) else float(text)
    except ValueError as error:
        raise TypeError from error


def check_value(value: Any, kind: Any) -> Any:
    """Convert `value` from YAML to a value of the type `kind`.

    Raises:
        TypeError: `value` is not of that type.
    """
    for member in _members(kind):
        try:
            return _check_member(value, member)
        except TypeError:
            pass
    raise TypeError(f"must be {describe_type(kind)}")


def describe_type(kind: Any, name: str = "") -> str:
    """Return a description in words of the values of the type `kind`, with an example that suits the option `name`."""
    rules = []
    for member in _members(kind):
        if get_origin(member) is Literal:
            rules += [f"`{choice}`" for choice in get_args(member)]
        else:
            rules.append(_DESCRIPTIONS[get_origin(member) or member])
    rules = list(dict.fromkeys(rules))
    if is_list(kind) and name in _LIST_EXAMPLES:
        example = f"{_DESCRIPTIONS[tuple]}, such as {_LIST_EXAMPLES[name]}"
        rules = [example if rule == _DESCRIPTIONS[tuple] else rule for rule in rules]
        return ", or ".join(rules)
    return " or ".join(rules)


def choices(kind: Any) -> tuple[str, ...]:
    """Return the choices of the `Literal` in the type `kind`, or an empty tuple if there is none."""
    return tuple(choice for member in _members(kind) if get_origin(member) is Literal for choice in get_args(member))


def takes_choices_only(kind: Any) -> bool:
    """Return whether every value of the type `kind` is a choice of a `Literal`; null may also be allowed."""
    return all(get_origin(member) is Literal or member is NoneType for member in _members(kind))


def is_switch(kind: Any) -> bool:
    """Return whether an option of the type `kind` needs no value: `--quick` means `--quick true`."""
    return set(_members(kind)) - {NoneType} == {bool}


def is_list(kind: Any) -> bool:
    """Return whether values of the type `kind` are lists in brackets; null may also be allowed."""
    return any(get_origin(member) is tuple for member in _members(kind))


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _check_member(value: Any, member: Any) -> Any:
    if get_origin(member) is Literal:
        return _require(value, value in get_args(member))
    if get_origin(member) is tuple:
        kinds = get_args(member)
        _require(value, isinstance(value, list))
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        _require(value, len(kinds) == len(value))
        return tuple(check_value(item, kind) for item, kind in zip(value, kinds, strict=True))
    if member is float:
        return _check_float(value)
    return _require(value, type(value) is member)  # a bool is not an int here


def _check_float(value: Any) -> float:
    _require(value, isinstance(value, int | float | str) and not isinstance(value, bool))
    try:
        number = float(value)  # YAML reads 1e-3 as text
    except (ValueError, OverflowError) as error:
        raise TypeError from error
    return float(_require(number, math.isfinite(number)))


def _require(value: Any, holds: bool) -> Any:
    if not holds:
        raise TypeError
    return value
