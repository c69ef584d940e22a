"""Quantities as text, with units that fit their size."""


def format_seconds(seconds: float) -> str:
    """Return a duration in milliseconds, seconds or minutes."""
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def nearest_multiples(number: int, unit: int) -> str:
    """Return the positive multiples of `unit` nearest to `number`, which is not one itself, such as "96 or 104"."""
    lower = number // unit * unit
    return f"{lower} or {lower + unit}" if lower else str(unit)


def format_rate(per_second: float, noun: str) -> str:
    """Return a rate such as "1,520 images/s", with two significant digits below 10."""
    number = f"{per_second:,.0f}" if per_second >= 9.95 else f"{per_second:.2g}"
    return f"{number} {noun}/s"
