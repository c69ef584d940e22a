"""Tables of the benchmarks, as Markdown and as CSV."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MIB = 2**20

Row = dict[str, Any]
"""A row of a CSV, by column."""


class Section(NamedTuple):
    """One section of a page."""

    lines: list[str]
    """Lines of the page."""
    rows: list[Row]
    """Rows of the CSV."""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table with the first column aligned left and the others right."""
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    return [*lines, *[f"| {' | '.join(row)} |" for row in rows], ""]


def mib(num_bytes: int | None) -> str:
    """Return the number of MiB for a table, or an empty cell."""
    return "" if num_bytes is None else f"{num_bytes / MIB:,.1f}"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the rows, with a header of column names."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_sections(heading: Sequence[str], sections: Mapping[str, Section], stem: Path) -> None:
    """Write a page and, for each section, a CSV; print the page.

    Args:
        heading: Lines before the sections.
        sections: The sections by the end of the name of their CSV.
        stem: Path of the files without the end of their names.
    """
    lines = [*heading]
    for name, section in sections.items():
        lines += section.lines
        write_csv(section.rows, stem.with_name(f"{stem.name}_{name}.csv"))
    text = "\n".join(lines).rstrip() + "\n"
    stem.with_name(f"{stem.name}.md").write_text(text)
    print(text)
