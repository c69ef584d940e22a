"""Text for language models, in tokens."""

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from revnet._checks import check_path
from revnet._units import counted
from revnet.data.sources.documents import Documents, read_documents
from revnet.data.tokens.abstract_vocabulary import AbstractVocabulary
from revnet.data.tokens.byte_pairs import BytePairVocabulary
from revnet.data.tokens.vocabulary import Vocabulary
from revnet.errors import DataError

CHARACTERS, BPE = "characters", "bpe"
"""Tokenizers that are made from the text; every other name is the path of a file."""
_USUAL_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class TextDataset:
    """A text, cut in two: the beginning for training, the end for validation."""

    name: str
    """Name of the text in logs and file names."""
    vocabulary: AbstractVocabulary
    """Tokens of both parts."""
    train: Tensor
    """Tokens for training: (N,), int32."""
    validation: Tensor
    """Tokens for validation: (M,), int32."""
    num_documents: tuple[int, int] | None = None
    """Number of documents for training and for validation, between which the tokens have the end of a text; None if
    the source is one text."""

    def describe(self) -> str:
        """Return the source and its tokens as text."""
        counts = f"{len(self.train):,} train, {len(self.validation):,} validate"
        if self.num_documents is not None:
            train, validation = self.num_documents
            counts += f"; {counted(train, 'document')} train, {validation:,} validate"
        return f"{self.name}, {self.vocabulary.describe()}: {counts}"


def load_text(
    path: str | Path, *, val_fraction: float = 0.1, tokenizer: str | Path = CHARACTERS, vocab_size: int | None = None
) -> TextDataset:
    """Read a text, or many documents, and write it in tokens.

    The source is a text file in UTF-8; a folder, in which each `.txt` file is a document; or a `.jsonl` file, in which
    the field `text` of each line is one. Documents are joined with a token for the end of a text between them, before
    the first and after the last: what follows this token is the beginning of a document.

    Args:
        path: The file or folder; `~` is the home directory.
        val_fraction: Share of the characters, at the end, for validation. Documents stay whole, and each part has at
            least one, if there are several.
        tokenizer: "characters"; "bpe" for byte-level BPE, trained on the part for training; or the path of a
            `tokenizer.json` of byte-level BPE, in the format of the `tokenizers` library.
        vocab_size: Number of tokens to learn for "bpe", by default 4,096, or to expect in the file.

    Raises:
        DataError: The source or the tokenizer is missing, damaged, empty, larger than 4 GiB, or not a text.
        MissingDependencyError: The `tokenizers` library is not installed.
        ValueError: `vocab_size` is below 257, or the file has another number of tokens.
    """
    check_path("path", path, hint="a text file, a folder of them, or a .jsonl file")
    check_path("tokenizer", tokenizer, hint=f"'{CHARACTERS}', '{BPE}', or a tokenizer.json")
    documents = read_documents(path)
    train, validation = documents.divide(val_fraction)
    vocabulary = _make_vocabulary(documents, train, str(tokenizer), vocab_size)
    if documents.is_one:
        train_tokens, validation_tokens = vocabulary.encode_all([*train, *validation])
        return TextDataset(documents.name, vocabulary, train_tokens, validation_tokens)
    if vocabulary.end_of_text is None:
        raise DataError(
            f"`tokenizer` (='{tokenizer}') has no special token for the end of a text, such as <|endoftext|>, which "
            "goes between documents; pass another tokenizer, or one text file."
        )
    return TextDataset(
        documents.name,
        vocabulary,
        vocabulary.pack(train),
        vocabulary.pack(validation),
        num_documents=(len(train), len(validation)),
    )


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Return the bits per byte of a mean loss in nats per token; they compare different tokens of the same text."""
    return loss / (bytes_per_token * math.log(2)) if bytes_per_token else math.nan


def _make_vocabulary(
    documents: Documents, train: list[str], tokenizer: str, vocab_size: int | None
) -> AbstractVocabulary:
    if tokenizer == CHARACTERS:
        return Vocabulary.of(documents.texts[0]) if documents.is_one else Vocabulary.of_documents(documents.texts)
    if tokenizer == BPE:
        return BytePairVocabulary.train(train, _USUAL_TOKENS if vocab_size is None else vocab_size)
    vocabulary = BytePairVocabulary.read(tokenizer)
    if vocab_size not in (None, len(vocabulary)):
        raise ValueError(
            f"`vocab_size` (={vocab_size}) is not the number of tokens in `tokenizer` (='{tokenizer}'), "
            f"{len(vocabulary)}; leave it out, or pass another file."
        )
    return vocabulary
