"""Tables of `memory.py`, as Markdown and as CSV."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

MIB = 2**20

Row = dict[str, Any]
"""A line of a CSV, by columns."""


class Section(NamedTuple):
    """What one table brings."""

    lines: list[str]
    """Of the page."""
    rows: list[Row]
    """Of the CSV."""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown; the first column to the left, figures to the right."""
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    return [*lines, *[f"| {' | '.join(row)} |" for row in rows], ""]


def mib(num_bytes: int | None) -> str:
    """A table's figure."""
    return "" if num_bytes is None else f"{num_bytes / MIB:,.1f}"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the rows, under a line with the names of the columns."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
