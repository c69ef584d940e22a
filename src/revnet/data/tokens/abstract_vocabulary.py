"""The interface between a text and its tokens."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor


class AbstractVocabulary(ABC):
    """The tokens of a text. A token is an integer from 0 to `len(vocabulary) - 1`."""

    noun: ClassVar[str]
    """Noun for a token, such as "character"."""

    @property
    @abstractmethod
    def end_of_text(self) -> int | None:
        """Token before the first document, between two documents and after the last; None if there is none."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of different tokens."""

    @abstractmethod
    def encode(self, text: str, name: str = "text") -> Tensor:
        """Return the tokens of a text: (T,), int64.

        Args:
            text: The text.
            name: Name of the argument, for errors.

        Raises:
            ValueError: The text cannot be written in these tokens.
        """

    @abstractmethod
    def decode(self, tokens: Tensor) -> str:
        """Return the text of `tokens`, (T,)."""

    @abstractmethod
    def encode_all(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the tokens of long texts, int32."""

    @abstractmethod
    def token_bytes(self) -> Tensor:
        """Return the number of bytes that each token has in UTF-8: (len(self),), int64. The end of a text has none."""

    @abstractmethod
    def describe(self) -> str:
        """Return the number and the kind of the tokens as text."""

    def pack(self, documents: Sequence[str]) -> Tensor:
        """Return the tokens of `documents`, with the end of text before, between and after them: (N,), int32."""
        assert self.end_of_text is not None
        end = torch.tensor([self.end_of_text], dtype=torch.int32)
        parts = [end]
        for tokens in self.encode_all(documents):
            parts += [tokens, end]
        return torch.cat(parts)
