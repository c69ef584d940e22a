"""Checks of a setting.

Each raises an error of one line with the name of the setting, its value and the rule. None needs PyTorch, so that the
command line can refuse a flag at once.
"""

import math
import operator
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from revnet.errors import MissingDependencyError
from revnet.training.settings.choices import LOGGERS

_LARGEST_FLOAT = 3e38


def check_name(name: str, value: Any) -> None:
    """Raise unless `value` is a string that is not blank."""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` (={value!r}) must be a string.")
    if not value.strip():
        raise ValueError(f"`{name}` (={value!r}) must not be empty.")


def check_flag(name: str, value: Any, *, is_optional: bool = False) -> None:
    """Raise unless `value` is true or false, or null if it `is_optional`."""
    if value not in (True, False) and not (is_optional and value is None):
        choices = "true, false or null" if is_optional else "true or false"
        raise TypeError(f"`{name}` (={value!r}) must be {choices}.")


def is_index(value: Any) -> bool:
    """Return whether `value` is an integer, such as Python's and NumPy's. A bool does not count.

    Arguments of the library must be Python's integers, see `is_integer` in `revnet._checks`, which loads PyTorch.
    """
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        return False
    try:
        operator.index(value)
    except TypeError:  # an array of several numbers
        return False
    return True


def check_integer(name: str, value: Any, *, at_least: int, at_most: int | None = None) -> int:
    """Return `value` as Python's integer; raise unless it is one in the range, of at most 63 bits."""
    if not is_index(value):
        raise TypeError(f"`{name}` (={value!r}) must be an integer.")
    if value < at_least:
        raise ValueError(f"`{name}` (={value}) must be {at_least} or more.")
    at_most = sys.maxsize if at_most is None else at_most
    if value > at_most:
        raise ValueError(f"`{name}` (={value}) must be {at_most} or less.")
    return operator.index(value)


def check_number(name: str, value: Any, rule: str, holds: Callable[[float], bool], advice: str) -> None:
    """Raise unless `value` is a finite number for which `holds` returns true.

    Args:
        name: Name of the setting.
        value: The setting.
        rule: The rule in words, after "must be a finite number".
        holds: The rule as a function.
        advice: A usual value.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"`{name}` (={value!r}) must be a number.")
    if not (math.isfinite(value) and holds(value)):
        raise ValueError(f"`{name}` (={value}) must be a finite number {rule}; {advice}.")
    if abs(value) > _LARGEST_FLOAT:
        raise ValueError(f"`{name}` (={value}) must be {_LARGEST_FLOAT:g} or less, as float32 is; {advice}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        listed = " or ".join(f"`{choice}`" for choice in choices)
        raise ValueError(f"`{name}` (={value!r}) must be {listed}.")


def check_fractions(name: str, values: Any) -> tuple[float, ...]:
    """Return `values` as a tuple; raise unless they are fractions between 0 and 1 in ascending order."""
    fractions = tuple(values) if isinstance(values, list | tuple) else None
    if fractions is None or not all(isinstance(x, int | float) and 0 < x < 1 for x in fractions):
        raise ValueError(f"`{name}` (={values!r}) must be a list of fractions between 0 and 1, such as [0.5, 0.75].")
    if list(fractions) != sorted(fractions):
        raise ValueError(f"`{name}` (={list(fractions)}) must rise; sort it.")
    return fractions


def check_range(name: str, values: Any) -> tuple[float, float]:
    """Return `values` as a tuple; raise unless they are two shares in ascending order, above 0 and at most 1."""
    shares = tuple(values) if isinstance(values, list | tuple) else ()
    if len(shares) != 2 or not all(isinstance(x, int | float) for x in shares) or not 0 < shares[0] <= shares[1] <= 1:
        raise ValueError(f"`{name}` (={values!r}) must be two shares above 0, the second at most 1, such as [0.08, 1].")
    return shares


def check_class_weights(name: str, value: Any) -> None:
    """Raise unless `value` is a list of weights, or the word for balanced ones."""
    if value == "balanced":
        return
    is_list = isinstance(value, list | tuple) and all(isinstance(x, int | float) and 0 <= x < math.inf for x in value)
    if not is_list or not any(value):
        raise ValueError(
            f"`{name}` (={value!r}) must be `balanced`, or a list of weights that are 0 or more, such as [1, 2.5]."
        )


def check_memory_budget(budget: Any, policy: str) -> None:
    """Raise unless `budget` is a number of bytes with a unit, and `policy` was left at its default."""
    from revnet.memory import parse_bytes  # loads PyTorch, which `revnet train --help` does without

    check_name("memory_budget", budget)
    parse_bytes(budget, "memory_budget")
    if policy != "reverse":
        raise ValueError(
            f"`policy` (={policy!r}) does not go with a `memory_budget`, which chooses a policy for each block; leave "
            "one of the two out."
        )


def check_move(name: str, value: Any) -> None:
    """Raise unless `value` is a value of the argument `name` of `Reverse`: `hold` or `keep`."""
    from revnet.nn import Reverse  # loads PyTorch, which `revnet train --help` does without

    check_name(name, value)
    Reverse(**{name: value})


def check_moves(moves: Mapping[str, str | None], policy: str, memory_budget: str | None) -> None:
    """Raise if `hold` or `keep` is set, and the policy of the blocks is not `reverse`."""
    for name, value in moves.items():
        if value is not None and policy != "reverse":
            raise ValueError(
                f"`{name}` (={value!r}) goes with the policy `reverse` only, and `policy` is {policy!r}; leave one of "
                "the two out."
            )
        if value is not None and memory_budget is not None:
            raise ValueError(
                f"`{name}` (={value!r}) does not go with a `memory_budget`, which chooses it for each block; leave one "
                "of the two out."
            )


def check_loggers(name: str, value: Any) -> None:
    """Raise unless `value` lists loggers, separated by commas, whose packages are installed."""
    check_name(name, value)
    for logger in split_loggers(value):
        if logger not in LOGGERS:
            close = get_close_matches(logger, LOGGERS, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"the loggers are {', '.join(LOGGERS)}."
            raise ValueError(f"`{name}` (={value!r}) has the unknown logger `{logger}`; {hint}")
        if logger != "csv" and find_spec(logger) is None:
            raise MissingDependencyError.of(logger, f"`{name}` (={value!r})")


def split_loggers(value: str) -> list[str]:
    """Return the names in a list that is separated by commas, each of them once."""
    return list(dict.fromkeys(logger.strip() for logger in value.split(",")))
