"""Text for language models, with characters as tokens."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from revnet._image_files import explain_link
from revnet._input_files import read_text
from revnet.errors import DataError

_MOST_BYTES = 2**32
"""Largest text, since it is read whole; tokens take as much memory again."""


class Vocabulary:
    """The characters of a text; a token is the index of a character among them.

    Args:
        characters: All characters, sorted, without duplicates.
    """

    def __init__(self, characters: str) -> None:
        if not characters or list(characters) != sorted(set(characters)):
            raise ValueError(
                f"`characters` (={characters!r}) must be sorted and without duplicates; use `Vocabulary.of(text)`."
            )
        self.characters = characters
        self._token = {character: token for token, character in enumerate(characters)}

    @classmethod
    def of(cls, text: str) -> "Vocabulary":
        """Return the vocabulary of a text."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def __repr__(self) -> str:
        return f"Vocabulary({self.characters!r})"

    def encode(self, text: str, name: str = "text") -> Tensor:
        """Return the tokens of a text: (T,), int64.

        Args:
            text: The text.
            name: Name of the argument, for errors.

        Raises:
            ValueError: The text has a character that is not in the vocabulary.
        """
        unknown = next((character for character in text if character not in self._token), None)
        if unknown is not None:
            raise ValueError(
                f"`{name}` has the character {unknown!r}, which is not among the {len(self)} of the vocabulary: "
                f"{self.characters!r}; leave it out."
            )
        return torch.tensor([self._token[character] for character in text], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """Return the text of `tokens`, (T,)."""
        return "".join(self.characters[token] for token in tokens.tolist())


@dataclass(frozen=True, eq=False)
class TextDataset:
    """A text, cut in two: the beginning for training, the end for validation."""

    name: str
    """Name of the text in logs and file names."""
    vocabulary: Vocabulary
    """Characters of both parts."""
    train: Tensor
    """Tokens for training: (N,), int32."""
    validation: Tensor
    """Tokens for validation: (M,), int32."""


def load_text(path: str | Path, *, val_fraction: float = 0.1) -> TextDataset:
    """Read a text file in UTF-8.

    Args:
        path: The file; `~` is the home directory.
        val_fraction: Share of the characters, at the end, for validation.

    Raises:
        DataError: The file is missing, empty, larger than 4 GiB, or not a text.
    """
    path = Path(path).expanduser()
    if (fault := explain_link(path)) is not None:
        raise DataError(f"`data` (='{path}') {fault}.")
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
        raise DataError(f"`data` (='{path}') {problem}; pass a text file.")
    try:
        text = read_text(path, _MOST_BYTES)
    except OSError as error:
        raise DataError(f"`data` (='{path}') cannot be read: {error.strerror}; pass a text file.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"`data` (='{path}') is not text in UTF-8, at byte {error.start:,}; pass a text file, or convert it."
        ) from error
    if "\0" in text:
        raise DataError(f"`data` (='{path}') is not a text, since it contains zero bytes; pass a text file.")
    if not text:
        raise DataError(f"`data` (='{path}') is empty; pass a text file with some content.")
    vocabulary = Vocabulary.of(text)
    tokens = _encode_all(text, vocabulary)
    num_train = round((1 - val_fraction) * len(tokens))
    return TextDataset(path.stem, vocabulary, tokens[:num_train], tokens[num_train:])


def _encode_all(text: str, vocabulary: Vocabulary) -> Tensor:
    # With arrays of code points, since a file may have millions of characters.
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    known = np.frombuffer(vocabulary.characters.encode("utf-32-le"), dtype=np.uint32)
    return torch.from_numpy(np.searchsorted(known, points).astype(np.int32))
