"""Quantities as text, with units that fit their size."""

import math


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, such as "1 image" or "1,000 images".

    Args:
        number: The number.
        noun: The noun in the singular.
        plural: The noun in the plural; by default, the singular with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def counted_samples(number: int, samples: str) -> str:
    """Return a number with a plural noun such as "images" or "windows of 16 characters", which loses its s after 1."""
    noun, space, rest = samples.partition(" ")
    return f"{number:,} {noun.removesuffix('s') if number == 1 else noun}{space}{rest}"


def format_seconds(seconds: float) -> str:
    """Return a duration in milliseconds, seconds, minutes or hours."""
    if seconds < 0.001:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def nearest_multiples(number: int, unit: int) -> str:
    """Return the positive multiples of `unit` nearest to `number`, which is not one itself, such as "96 or 104"."""
    lower = number // unit * unit
    return f"{lower} or {lower + unit}" if lower else str(unit)


def format_rate(per_second: float, noun: str) -> str:
    """Return a rate such as "1,520 images/s", per minute or per hour if it is slow, with two digits below 10."""
    rate, unit = per_second, "s"
    if rate < 0.1:
        rate, unit = 60 * per_second, "min"
    if rate < 0.1:
        rate, unit = 3600 * per_second, "h"
    number = f"{rate:,.0f}" if rate >= 9.95 else f"{rate:.2g}"
    return f"{number} {noun}/{unit}"


def format_loss(loss: float) -> str:
    """Return a loss with four decimals, or with five significant digits if it is very large or very small."""
    return f"{loss:.4f}" if loss == 0 or 1e-3 <= abs(loss) < 1e6 or not math.isfinite(loss) else f"{loss:.4e}"


def format_perplexity(nats: float) -> str:
    """Return the perplexity of a cross-entropy in nats."""
    return f"{math.exp(nats):,.2f}" if nats < 13 else f"{math.exp(min(nats, 700.0)):.3g}"
