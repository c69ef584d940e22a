"""Byte-level BPE: tokens of one or more bytes, which the `tokenizers` library learns and finds."""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revnet._input_files import read_text
from revnet._outside_text import printable
from revnet._paths import expand_user
from revnet.data._require import require
from revnet.data.tokens.abstract_vocabulary import AbstractVocabulary
from revnet.data.tokens.tokenizer_file import BYTE_OF_LETTER, MOST_BYTES, TokenizerFile, parse_tokenizer
from revnet.errors import DataError

END_OF_TEXT = "<|endoftext|>"
"""Name of the token between documents in the tokenizers that are trained here."""
LEAST_TOKENS = len(BYTE_OF_LETTER) + 1
"""Number of tokens without any that are learned: one for each byte, and the end of a text."""
_CUT = re.compile(r"(?<=\S)\n(?=\S)")
"""A single line break, after which every pattern cuts; how several are cut depends on what follows."""
_PIECE = 2**20
"""Characters of a text that the library reads as one."""
_BATCH = 8 * _PIECE
"""Characters that the library reads at a time, in parallel."""


class BytePairVocabulary(AbstractVocabulary):
    """Tokens of byte-level BPE: single bytes, and sequences of bytes that are frequent in the text it was trained on.

    It writes every text in UTF-8, whatever it was trained on, and returns it unchanged. Only encoding needs the
    `tokenizers` library.

    Args:
        file: The tokenizer, from `train`, `read` or `parse_tokenizer`.

    References:
        Sennrich, Haddow, Birch (2016), Neural Machine Translation of Rare Words with Subword Units.
        Radford et al. (2019), Language Models are Unsupervised Multitask Learners, section 2.2.
    """

    noun = "token"

    def __init__(self, file: TokenizerFile) -> None:
        self.file = file

    @classmethod
    def train(cls, texts: Sequence[str], vocab_size: int) -> "BytePairVocabulary":
        """Learn tokens from texts, by joining the most frequent pair of tokens again and again.

        Args:
            texts: The texts.
            vocab_size: Number of tokens, at least 257; there are fewer if no pair is left that occurs twice.

        Raises:
            MissingDependencyError: The `tokenizers` library is not installed.
            ValueError: `vocab_size` is below 257.
        """
        if vocab_size < LEAST_TOKENS:
            raise ValueError(
                f"`vocab_size` (={vocab_size}) must be at least {LEAST_TOKENS}: a token for each byte, and one for the "
                "end of a text."
            )
        library: Any = _library()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(BYTE_OF_LETTER),
            show_progress=False,
        )
        tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
        return cls(parse_tokenizer(tokenizer.to_str()))

    @classmethod
    def read(cls, path: str | Path) -> "BytePairVocabulary":
        """Read a `tokenizer.json`, in the format of the `tokenizers` library.

        Args:
            path: The file; `~` is the home directory.

        Raises:
            DataError: The file is missing or damaged, or is not of a byte-level BPE tokenizer.
        """
        path = expand_user(path)
        try:
            return cls(parse_tokenizer(read_text(path, MOST_BYTES)))
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
        except UnicodeDecodeError as error:
            reason = f"is not text in UTF-8, at byte {error.start:,}"
        except ValueError as error:
            reason = f"is not the file of a byte-level BPE tokenizer: {printable(str(error))}"
        raise DataError(
            f"`tokenizer` (='{path}') {reason}; pass `characters`, `bpe`, or the tokenizer.json of a byte-level BPE "
            "tokenizer."
        )

    @property
    def end_of_text(self) -> int | None:
        """Special token for the end of a text; None if the tokenizer has none."""
        return self.file.end_of_text

    def __len__(self) -> int:
        return len(self.file.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BytePairVocabulary) and self.file == other.file

    def __hash__(self) -> int:
        return hash(self.file.tokens)

    def __repr__(self) -> str:
        return f"<BytePairVocabulary of {len(self)} tokens>"

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file}  # the library's object would lose a setting

    def encode(self, text: str, name: str = "text") -> Tensor:
        """Return the tokens of a text: (T,), int64. The name of a special token in the text is ordinary text.

        Args:
            text: The text.
            name: Name of the argument, for errors.

        Raises:
            ValueError: The text has half of a pair of surrogates, which UTF-8 cannot write.
            MissingDependencyError: The `tokenizers` library is not installed.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"`{name}` has {text[error.start]!r} at character {error.start:,}, which UTF-8 cannot write; leave it "
                "out."
            ) from None
        return self.encode_all([text])[0].long()

    def encode_all(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the tokens of long texts, int32."""
        parts: list[list[Tensor]] = [[] for _ in texts]
        batch: list[tuple[int, str]] = []

        def encode_batch() -> None:
            pieces = self._library_tokenizer.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (number, _), piece in zip(batch, pieces, strict=True):
                parts[number].append(torch.tensor(piece.ids, dtype=torch.int32))
            batch.clear()

        size = 0
        for number, text in enumerate(texts):
            for piece in _pieces(text):
                batch.append((number, piece))
                size += len(piece)
                if size >= _BATCH:
                    encode_batch()
                    size = 0
        encode_batch()
        return [torch.cat(part) for part in parts]

    def decode(self, tokens: Tensor) -> str:
        """Return the text of `tokens`, (T,); a sequence of bytes that is not UTF-8 becomes a replacement character."""
        return b"".join(map(self.file.bytes_of, tokens.tolist())).decode("utf-8", "replace")

    def token_bytes(self) -> Tensor:
        """Return the number of bytes of each token: (len(self),), int64; the end of a text has none."""
        end = self.end_of_text
        sizes = [0 if number == end else len(self.file.bytes_of(number)) for number in range(len(self))]
        return torch.tensor(sizes, dtype=torch.int64)

    def describe(self) -> str:
        """Return the number of tokens as text."""
        return f"byte-level BPE of {len(self):,} tokens"

    @cached_property
    def _library_tokenizer(self) -> Any:
        tokenizer = _library().Tokenizer.from_str(self.file.to_json())
        tokenizer.encode_special_tokens = True  # a text is text, whatever it says
        return tokenizer


def _library() -> Any:
    return require("tokenizers", package="tokenizers", purpose="byte-level BPE")


def _pieces(text: str) -> Iterator[str]:
    """Yield the text in pieces of about a million characters, each of which has the tokens that it has in the text."""
    start = 0
    while len(text) - start > _PIECE and (cut := _CUT.search(text, start + _PIECE)) is not None:
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]
