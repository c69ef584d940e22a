"""Text for language models: characters as tokens, and windows that are a function of seed and update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from revnet.errors import DataError


class Vocabulary:
    """The characters that a text is written in; a token is the place of a character among them.

    Args:
        characters: All of them, sorted, each once.
    """

    def __init__(self, characters: str) -> None:
        if not characters or list(characters) != sorted(set(characters)):
            raise ValueError(f"`characters` (={characters!r}) must be sorted, each once; use `Vocabulary.of(text)`.")
        self.characters = characters
        self._token = {character: token for token, character in enumerate(characters)}

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        """The characters of a text."""
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
        """The tokens of a text: (T,), int64.

        Args:
            text: What is encoded.
            name: The argument's name, for errors.

        Raises:
            ValueError: It has a character that is not in the vocabulary.
        """
        unknown = next((character for character in text if character not in self._token), None)
        if unknown is not None:
            raise ValueError(
                f"`{name}` has the character {unknown!r}, which is not among the {len(self)} of the vocabulary: "
                f"{self.characters!r}; leave it out."
            )
        return torch.tensor([self._token[character] for character in text], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens, (T,)."""
        return "".join(self.characters[token] for token in tokens.tolist())


@dataclass(frozen=True, eq=False)
class TextDataset:
    """A text, cut in two: the beginning to learn from, the end to validate."""

    name: str
    """How it is called in logs and file names."""
    vocabulary: Vocabulary
    """The characters of both parts."""
    train: Tensor
    """Tokens: (N,), int32."""
    validation: Tensor
    """Tokens: (M,), int32."""


def load_text(path: str | Path, *, val_fraction: float = 0.1) -> TextDataset:
    """Read a text file in UTF-8.

    Args:
        path: The file; `~` is the home directory.
        val_fraction: Share of the characters, at the end, that validates.

    Raises:
        DataError: The file is missing, empty, or no text.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"`data` (='{path}') {what}; pass a text file.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"`data` (='{path}') is not text in UTF-8, at byte {error.start:,}; pass a text file, or convert it."
        ) from error
    if "\0" in text:
        raise DataError(f"`data` (='{path}') holds bytes of zero, so it is no text; pass a text file.")
    if not text:
        raise DataError(f"`data` (='{path}') is empty; pass a text file with something in it.")
    vocabulary = Vocabulary.of(text)
    tokens = _encode_all(text, vocabulary)
    num_train = round((1 - val_fraction) * len(tokens))
    return TextDataset(path.stem, vocabulary, tokens[:num_train], tokens[num_train:])


class RandomWindows(Iterable[Tensor]):
    """Batches of windows from random places of a text, (B, length + 1), int64: inputs and, one later, targets.

    The places are a function of `seed` and of the update's number alone, so a run that resumes sees the windows that it
    would have seen, and nothing is drawn from PyTorch's global generator.

    Args:
        tokens: The text, (N,).
        length: Tokens of an input.
        batch_size: Windows a batch.
        num_batches: Batches an epoch. Lightning tells the epoch by `sampler.set_epoch`.
        seed: Which windows.
        pin_memory: Put batches into page-locked memory, for faster copies to a GPU.

    Raises:
        ValueError: A count is not positive, or the text has no window of `length + 1`.
    """

    batch_sampler = None  # where there is a `sampler`, Lightning looks for this too

    def __init__(
        self,
        tokens: Tensor,
        *,
        length: int,
        batch_size: int,
        num_batches: int,
        seed: int,
        pin_memory: bool = False,
    ) -> None:
        _check_counts(length=length, batch_size=batch_size, num_batches=num_batches)
        _check_length(tokens, length)
        self._tokens = tokens
        self._length = length
        self._batch_size = batch_size
        self._num_batches = num_batches
        self._seed = seed
        self._pin_memory = pin_memory
        self._epoch = 0

    @property
    def sampler(self) -> RandomWindows:
        """What is told the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is of; 0 until then."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Tensor]:
        for batch in range(self._num_batches):
            yield self.batch(self._epoch * self._num_batches + batch)

    def batch(self, update: int) -> Tensor:
        """The windows of one update."""
        draw = np.random.default_rng((self._seed, update))
        starts = torch.from_numpy(draw.integers(0, len(self._tokens) - self._length, self._batch_size))
        windows = _cut(self._tokens, starts, self._length)
        return windows.pin_memory() if self._pin_memory else windows


class ConsecutiveWindows(Iterable[Tensor]):
    """Batches of windows that follow one another, (B, length + 1), int64, in order; what is left over is left out.

    Args:
        tokens: The text, (N,).
        length: Tokens of an input. Each token but the first is a target once.
        batch_size: Windows a batch; the last one may be smaller.
        max_windows: With more, windows are left out, evenly; None for all.

    Raises:
        ValueError: A count is not positive, or the text has no window of `length + 1`.
    """

    def __init__(self, tokens: Tensor, *, length: int, batch_size: int, max_windows: int | None = None) -> None:
        _check_counts(length=length, batch_size=batch_size)
        _check_length(tokens, length)
        num_windows = (len(tokens) - 1) // length
        num_kept = min(num_windows, max_windows or num_windows)
        self._starts = length * (torch.arange(num_kept) * num_windows // num_kept)
        self._tokens = tokens
        self._length = length
        self._batch_size = batch_size

    @property
    def num_windows(self) -> int:
        """How many windows there are in all."""
        return len(self._starts)

    def __len__(self) -> int:
        return -(-len(self._starts) // self._batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for starts in self._starts.split(self._batch_size):
            yield _cut(self._tokens, starts, self._length)


def _encode_all(text: str, vocabulary: Vocabulary) -> Tensor:
    # By code points, since a file may have millions of characters.
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    known = np.frombuffer(vocabulary.characters.encode("utf-32-le"), dtype=np.uint32)
    return torch.from_numpy(np.searchsorted(known, points).astype(np.int32))


def _cut(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    return tokens[starts[:, None] + torch.arange(length + 1)].long()  # (B, length + 1)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` (={count}) must be positive.")


def _check_length(tokens: Tensor, length: int) -> None:
    if len(tokens) <= length:
        raise ValueError(
            f"`length` (={length}) must be less than the {len(tokens)} characters of each part of the text; pass a "
            "smaller one, or a longer text."
        )
