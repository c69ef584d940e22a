"""The distance between two checkpoints: a time or a number of updates."""

import re
from dataclasses import dataclass
from typing import Any

_SECONDS = {"s": 1, "min": 60, "h": 3600}
_RULE = "a number of updates, such as 500, or a time, such as 90s, 10min or 2h"
_TIME = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|h)")


@dataclass(frozen=True)
class SaveInterval:
    """Distance between two checkpoints; one of the two is None."""

    updates: int | None
    """Number of updates."""
    seconds: float | None
    """Time in seconds."""


def parse_interval(name: str, value: Any) -> SaveInterval:
    """Read a number of updates, such as 500, or a time, such as `90s`, `10min` or `2h`.

    Raises:
        TypeError: The value is neither an integer nor a string.
        ValueError: The value is not positive, or not a time.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"`{name}` (={value!r}) must be {_RULE}.")
    text = str(value).strip()
    updates = int(text) if text.isascii() and text.isdigit() else None
    time = _TIME.fullmatch(text)
    if updates is None and time is None:
        raise ValueError(f"`{name}` (={value!r}) must be {_RULE}.")
    seconds = None if time is None else float(time[1]) * _SECONDS[time[2]]
    if not (updates or seconds):
        raise ValueError(f"`{name}` (={value!r}) must be above 0; pass {_RULE}.")
    return SaveInterval(updates, seconds)


def check_interval(name: str, value: Any) -> None:
    """Raise unless `value` is a number of updates or a time."""
    parse_interval(name, value)
