"""Tables in plain text."""

from collections.abc import Sequence

from revnet._outside_text import printable


def aligned(rows: Sequence[Sequence[str]], num_left: int) -> list[str]:
    """Return one line for each row, with the first `num_left` columns aligned left and the others aligned right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < num_left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def format_lines(lines: Sequence[tuple[str, str]]) -> str:
    """Format names and values in two columns."""
    lines = [(printable(name), printable(value)) for name, value in lines]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)
