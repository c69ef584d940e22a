"""Characters as tokens."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from revnet.data.tokens.abstract_vocabulary import AbstractVocabulary

END_OF_TEXT = "\0"
"""Character between documents. No text has it."""


class Vocabulary(AbstractVocabulary):
    """The characters of a text; a token is the index of a character among them.

    Args:
        characters: All characters, sorted, without duplicates. Between documents, the character of code 0 stands for
            the end of a text.
    """

    noun = "character"

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

    @classmethod
    def of_documents(cls, documents: Iterable[str]) -> "Vocabulary":
        """Return the vocabulary of several texts and of the end of a text."""
        return cls("".join(sorted(set(END_OF_TEXT).union(*documents))))

    @property
    def end_of_text(self) -> int | None:
        """Token of the character of code 0, if the vocabulary has it."""
        return self._token.get(END_OF_TEXT)

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

    def encode_all(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the tokens of long texts whose characters are all in the vocabulary, int32."""
        # With arrays of code points, since a file may have millions of characters.
        known = np.frombuffer(self.characters.encode("utf-32-le"), dtype=np.uint32)
        points = (np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32) for text in texts)
        return [torch.from_numpy(np.searchsorted(known, part).astype(np.int32)) for part in points]

    def token_bytes(self) -> Tensor:
        """Return the number of bytes of each character in UTF-8: (len(self),), int64."""
        sizes = [0 if character == END_OF_TEXT else len(character.encode()) for character in self.characters]
        return torch.tensor(sizes, dtype=torch.int64)

    def describe(self) -> str:
        """Return the number of characters as text."""
        return f"{len(self)} different characters"
