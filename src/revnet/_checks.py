"""Checks of arguments.

Each helper raises an error of one line that a tired reader can act on. It names the argument in backticks, shows its
value, and says which rule the value breaks and what to pass instead.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

MOST_LAYERS = 100_000
"""Largest number of layers. Building more would take minutes, so a larger number is a mistake."""
MOST_CHANNELS = 2**20
"""Largest width of a layer. Matrices of a larger one fit no machine."""
_MOST = 2**31 - 1
_LONGEST = 60
"""Characters of a value that a message shows."""


def describe(value: object) -> str:
    """Return `value` as a message shows it: in one short line."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def is_integer(value: object) -> bool:
    """Return whether `value` is an integer, which a bool is not here."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether `value` is a finite number, which a bool is not here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_count(name: str, value: Any, *, least: int = 1, most: int = _MOST, hint: str = "") -> None:
    """Raise unless `value` is an integer from `least` to `most`.

    Args:
        name: Name of the argument.
        value: The argument.
        least: Smallest value allowed.
        most: Largest value allowed.
        hint: What to pass instead, such as "2 halves the image".
    """
    if is_integer(value) and least <= value <= most:
        return
    hint = f"; {hint}" if hint else ""
    if is_integer(value) and value > most:
        raise ValueError(f"`{name}` (={describe(value)}) must be at most {most:,}{hint}.")
    rule = {0: "a positive integer, or 0", 1: "a positive integer"}.get(least, f"an integer of at least {least}")
    raise ValueError(f"`{name}` (={describe(value)}) must be {rule}{hint}.")


def check_bool(**flags: Any) -> None:
    """Raise unless each of `flags` is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"`{name}` (={describe(value)}) must be True or False.")


def check_share(*, below_one: bool = True, **shares: Any) -> None:
    """Raise unless each of `shares` is a number from 0 to 1, or from 0 to below 1."""
    for name, share in shares.items():
        if not is_number(share) or not 0 <= share <= 1 or (below_one and share == 1):
            rule = "from 0 to below 1; 0 drops nothing" if below_one else "from 0 to 1"
            raise ValueError(f"`{name}` (={describe(share)}) must be a number {rule}.")


def check_positive_number(name: str, value: Any, *, hint: str) -> None:
    """Raise unless `value` is a positive number; `hint` says what is usual."""
    if not is_number(value) or value <= 0:
        raise ValueError(f"`{name}` (={describe(value)}) must be a positive number; {hint}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` (={describe(value)}) must be {' or '.join(map(repr, choices))}.")


def check_module(name: str, value: Any, *, hint: str = "pass a model") -> None:
    """Raise unless `value` is a module; `hint` says what to pass."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"`{name}` (={describe(value)}) must be an nn.Module; {hint}.")


def check_tensor(name: str, value: Any, *, hint: str = "convert it with `torch.as_tensor`") -> None:
    """Raise unless `value` is a tensor; `hint` says how to make one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` (={describe(value)}) must be a tensor; {hint}.")
