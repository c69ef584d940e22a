"""Text from outside, such as names of files and classes, made safe for terminals, tables and pictures."""

import re
import unicodedata

_FORMULA_STARTS = ("=", "+", "-", "@")
_ESCAPED = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories that are escaped: control characters, halves of characters, and line breaks."""
_LONGEST_STEM = 120
"""Bytes of a part of a file name; a file system allows 255 for the whole."""
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that reverse the order in which a terminal shows the others."""


def printable(text: str) -> str:
    r"""Return `text` as one line in which no character controls the terminal; such characters are escaped as `\x1b`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(character) if _is_unsafe(character) else character for character in text)


def shorten(text: str, longest: int = 60) -> str:
    """Return `text` as one printable line of at most `longest` characters; three dots stand for the rest."""
    start = printable(text[: longest + 1])  # a text of megabytes is not worth the time
    return start if len(start) <= longest else f"{start[: longest - 3]}..."


def file_stem(text: str) -> str:
    """Return `text` as a part of a file name: letters, digits and dots, with dashes for other characters.

    It is empty if there are none.
    """
    words = re.sub(r"(?:[^\w.]|_)+", "-", unicodedata.normalize("NFC", text))
    return words.encode()[:_LONGEST_STEM].decode(errors="ignore").strip("-.")


def csv_cell(text: str) -> str:
    """Return `text` for a cell of a CSV file: without control characters, and not a formula in a spreadsheet.

    A text that begins like a formula gets a leading apostrophe.

    References:
        OWASP, CSV Injection.
    """
    safe = printable(text)
    return f"'{safe}" if safe.startswith(_FORMULA_STARTS) else safe


def encodable(text: str) -> str:
    """Return `text` with a question mark for each byte that is not UTF-8, so that a file can hold it."""
    return text.encode("utf-8", "replace").decode()


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in _ESCAPED or character in _DIRECTIONS


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()
