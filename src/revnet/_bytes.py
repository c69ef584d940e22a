"""Format and parse numbers of bytes."""

import re
from decimal import Decimal

_WRITTEN = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]+)\s*", re.IGNORECASE | re.ASCII)
# A bare letter is a power of 1024, as in Docker and Slurm; "KB" is 1000, as in the SI.
_UNITS = {"b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}
_MOST = 2**63
"""Number of bytes that no device can address."""


def format_bytes(num_bytes: int) -> str:
    """Format a number of bytes with a unit, such as "3.2 MiB"."""
    if abs(num_bytes) < 1024:
        return f"{num_bytes} B"
    value = num_bytes / 1024
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1023.95:
            return f"{value:.1f} {unit}" if unit in ("KiB", "MiB") else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:,.2f} PiB"


def parse_bytes(value: str | int, name: str = "budget") -> int:
    """Parse a number of bytes with a unit, such as "16GiB", "500 MB", "0.5g".

    "KiB", "MiB" and so on are powers of 1024, as are single letters; "KB", "MB" and so on are powers of 1000. Case does
    not matter. An int is a number of bytes.

    Args:
        value: A number with a unit, or an int of bytes.
        name: Name of the argument, for error messages.

    Raises:
        TypeError: `value` is neither a string nor an int.
        ValueError: `value` is not a positive number of bytes, it is an int of 2^63 or more, or it is a string without a
            unit.
    """
    if isinstance(value, int) and abs(value) >= _MOST:
        # Python does not print an integer of 5,000 digits.
        raise ValueError(
            f"`{name}` (an integer of {value.bit_length():,} bits) must be positive and below 2^63, such as '16GiB' or "
            "'500MB'."
        )
    rule = f"`{name}` (={value!r}) must be a number of bytes with a unit, such as '16GiB' or '500MB'"
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"{rule}, or an int of bytes.")
    if isinstance(value, str):
        match = _WRITTEN.fullmatch(value)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f"{rule}.")
        num_bytes = int(Decimal(match[1]) * _UNITS[match[2].lower()])
    else:
        num_bytes = value
    if num_bytes < 1:
        raise ValueError(f"`{name}` (={value!r}) must be positive, such as '16GiB' or '500MB'.")
    return num_bytes
