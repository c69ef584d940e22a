"""Help texts that fit the terminal."""

import argparse
import re
import shutil
import textwrap

_NARROWEST, _WIDEST = 40, 120
_NO_BREAK = "\u00a0"
"""A space at which `textwrap` does not break a line."""


def help_width() -> int:
    """Return the number of columns of a help text: as many as the terminal has, and not too many to read."""
    return min(max(shutil.get_terminal_size().columns - 1, _NARROWEST), _WIDEST)


def fill(text: str, width: int, indent: str = "") -> str:
    """Wrap `text` between words; lines after the first one begin with `indent`."""
    text = re.sub(r"\(default: \S+\)", lambda match: match[0].replace(" ", _NO_BREAK), text)
    filled = textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return filled.replace(_NO_BREAK, " ")


class HelpFormatter(argparse.HelpFormatter):
    """Fill the paragraphs of a docstring, and break its examples as a shell would read them."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=help_width())

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(
            _break_commands(paragraph, width) if "\n " in paragraph else fill(paragraph, width)
            for paragraph in paragraphs
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        return fill(text, width).splitlines()


def _break_commands(text: str, width: int) -> str:
    lines = []
    for line in text.splitlines():
        command = line.strip()
        indent = line[: len(line) - len(command)]
        parts = [f"{indent}{command}"]
        if len(line) > width:
            # Two columns are left for the backslash. An option stays on the line of its value.
            whole = re.sub(r"(?<= )(--[\w-]+) (?=[^-\s])", rf"\1{_NO_BREAK}", command)
            parts = textwrap.wrap(
                whole,
                width - 2,
                initial_indent=indent,
                subsequent_indent=indent * 2,
                break_long_words=False,
                break_on_hyphens=False,
            )
        lines.append(" \\\n".join(parts).replace(_NO_BREAK, " "))
    return "\n".join(lines)
