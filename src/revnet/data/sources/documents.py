"""Texts from a file, from a folder of files, or from lines of JSON."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from revnet._documents import parse_json
from revnet._image_files import explain_link
from revnet._input_files import read_text
from revnet._outside_text import printable
from revnet._paths import expand_user
from revnet.data.tokens.vocabulary import END_OF_TEXT
from revnet.errors import DataError

_MOST_BYTES = 2**32
"""Largest text, since it is read whole; tokens take as much memory again."""
_LINES = ".jsonl"
"""Suffix of a file with a JSON object per line, in lower case."""
_TEXT = ".txt"
"""Suffix of the files of a folder that are read, in lower case."""
_FIELD = "text"
"""Field of a JSON object with the document."""


@dataclass(frozen=True, eq=False)
class Documents:
    """The texts of a source."""

    name: str
    """Name of the source in logs and file names."""
    texts: list[str]
    """The documents, in the order of the source."""
    is_one: bool
    """Whether the source is one text, rather than several documents."""

    def divide(self, val_fraction: float) -> tuple[list[str], list[str]]:
        """Return the texts for training and for validation: the share `val_fraction`, at the end.

        Several documents stay whole, and each part has at least one of them.
        """
        if len(self.texts) == 1:
            text = self.texts[0]
            num_train = round((1 - val_fraction) * len(text))
            return [text[:num_train]], [text[num_train:]]
        goal = (1 - val_fraction) * sum(map(len, self.texts))
        num_train, size = 0, 0
        while num_train < len(self.texts) - 1 and (num_train == 0 or size + len(self.texts[num_train]) / 2 <= goal):
            size += len(self.texts[num_train])
            num_train += 1
        return self.texts[:num_train], self.texts[num_train:]


def read_documents(path: str | Path) -> Documents:
    """Read a text file in UTF-8, the `.txt` files of a folder, or the field `text` of each line of a `.jsonl` file.

    Documents of a folder are in the order of their paths within it. Empty documents are left out.

    Args:
        path: The file or folder; `~` is the home directory.

    Raises:
        DataError: The source is missing, empty, larger than 4 GiB, or not text.
    """
    path = expand_user(path)
    if (fault := explain_link(path)) is not None:
        raise DataError(f"`data` (='{path}') {fault}.")
    if path.is_dir():
        return Documents(path.resolve().name, list(_read_folder(path)), is_one=False)
    if not path.is_file():
        problem = "is not a regular file" if path.exists() else "does not exist"
        raise DataError(f"`data` (='{path}') {problem}; pass a text file, or a folder of them.")
    text = _read_file(path, _MOST_BYTES)
    if not text:
        raise DataError(f"`data` (='{path}') is empty; pass a text file with some content.")
    if path.suffix.lower() == _LINES:
        return Documents(path.stem, list(_read_lines(path, text)), is_one=False)
    return Documents(path.stem, [text], is_one=True)


def _read_file(path: Path, most_bytes: int) -> str:
    try:
        text = read_text(path, most_bytes)
    except OSError as error:
        raise DataError(f"`data` (='{path}') cannot be read: {error.strerror}; pass a text file.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"`data` (='{path}') is not text in UTF-8, at byte {error.start:,}; pass a text file, or convert it."
        ) from error
    if END_OF_TEXT in text:
        raise DataError(f"`data` (='{path}') is not a text, since it contains zero bytes; pass a text file.")
    return text


def _read_folder(path: Path) -> Iterator[str]:
    try:
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() == _TEXT
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
            and file.is_file()
        )
    except OSError as error:
        raise DataError(f"`data` (='{path}') cannot be read: {error.strerror}; pass a folder of text files.") from error
    left, is_empty = _MOST_BYTES, True
    for file in files:
        text = _read_file(file, max(left, 0))
        left -= len(text.encode())
        if text:
            is_empty = False
            yield text
    if is_empty:
        raise DataError(
            f"`data` (='{path}') is a folder without a {_TEXT} file with some content; pass a text file, a folder of "
            f"{_TEXT} files, or a {_LINES} file."
        )


def _read_lines(path: Path, content: str) -> Iterator[str]:
    is_empty = True
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = parse_json(line).get(_FIELD)
            if not isinstance(text, str):
                raise ValueError(f"it has no text in the field `{_FIELD}`")
            if END_OF_TEXT in text:
                raise ValueError("its text contains the character of code 0")
            text.encode()
        except UnicodeEncodeError:
            raise _bad_line(path, number, "its text has half of a pair of surrogates") from None
        except ValueError as error:
            raise _bad_line(path, number, str(error)) from None
        if text:
            is_empty = False
            yield text
    if is_empty:
        raise DataError(f"`data` (='{path}') is empty; pass a file with some documents.")


def _bad_line(path: Path, number: int, reason: str) -> DataError:
    return DataError(
        f"`data` (='{path}') has a line, {number:,}, that is not a document: {printable(reason)}; write each line as a "
        f'JSON object such as {{"{_FIELD}": "Once upon a time"}}.'
    )
