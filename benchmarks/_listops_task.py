"""Sequences of ListOps, with the rules of the Long Range Arena.

A sequence is a list of two to ten arguments with an operator, and an argument is a digit or a list, with a chance of
one in four, down to a depth of ten. MED is the median, rounded down, and SM the sum modulo 10.

References:
    Nangia, Bowman (2018), ListOps: A Diagnostic Dataset for Latent Tree Learning.
    Tay et al. (2021), Long Range Arena: A Benchmark for Efficient Transformers.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from revnet._atomic_file import atomic_path

OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
VOCABULARY = ("<pad>", *map(str, range(10)), *OPERATORS, "]")
MAX_DEPTH, MAX_ARGUMENTS, LIST_CHANCE = 10, 10, 0.25


class _TooLongError(Exception):
    """A sequence has more tokens than allowed."""


def draw_sequence(rng: random.Random, shortest: int, longest: int) -> tuple[list[str], int]:
    """Return the tokens of a random sequence of `shortest` to `longest` tokens, and its answer."""
    while True:
        tokens: list[str] = []
        try:
            answer = _draw_list(rng, tokens, 1, longest)
        except _TooLongError:
            continue
        if len(tokens) >= shortest:
            return tokens, answer


def _draw_list(rng: random.Random, tokens: list[str], depth: int, longest: int) -> int:
    """Append a random list to `tokens`, and return its value."""
    operator = rng.choice(tuple(OPERATORS))
    tokens.append(operator)
    values = []
    for _ in range(rng.randint(2, MAX_ARGUMENTS)):
        if len(tokens) >= longest:
            raise _TooLongError
        if depth < MAX_DEPTH and rng.random() < LIST_CHANCE:
            values.append(_draw_list(rng, tokens, depth + 1, longest))
        else:
            values.append(rng.randrange(10))
            tokens.append(str(values[-1]))
    tokens.append("]")
    if len(tokens) > longest:
        raise _TooLongError
    return OPERATORS[operator](values)


@dataclass(frozen=True)
class Examples:
    """Sequences sorted by length, so that a batch of neighbors has little padding."""

    sequences: list[list[int]]
    """Tokens of each sequence, as indices of `VOCABULARY`."""
    answers: list[int]

    def __len__(self) -> int:
        return len(self.answers)

    def rows(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens and mask, (B, T), and answers, (B,)."""
        longest = max(len(self.sequences[index]) for index in indices)
        tokens = torch.zeros(len(indices), longest, dtype=torch.long)
        for row, index in enumerate(indices):
            tokens[row, : len(self.sequences[index])] = torch.tensor(self.sequences[index])
        return tokens, tokens > 0, torch.tensor([self.answers[index] for index in indices])

    def batch(self, batch_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return neighbors from a random place, in the form of `rows`."""
        start = random.Random(seed).randrange(max(1, len(self) - batch_size + 1))
        return self.rows(range(start, min(start + batch_size, len(self))))


def make_examples(lengths: tuple[int, int], count: int, *, seed: int) -> Examples:
    """Return random sequences.

    Args:
        lengths: Fewest and most tokens of a sequence.
        count: Number of sequences.
        seed: Seed of the sequences.
    """
    rng = random.Random(seed)
    drawn = sorted((draw_sequence(rng, *lengths) for _ in range(count)), key=lambda example: len(example[0]))
    indices = {token: index for index, token in enumerate(VOCABULARY)}
    return Examples([[indices[token] for token in tokens] for tokens, _ in drawn], [answer for _, answer in drawn])


def load_examples(folder: Path | None, lengths: tuple[int, int], count: int, *, seed: int) -> Examples:
    """Return random sequences, from a file in the folder if they were made before."""
    if folder is None:
        return make_examples(lengths, count, seed=seed)
    path = folder / f"listops_{lengths[0]}_{lengths[1]}_{count}_{seed}.pt"
    if not path.exists():
        examples = make_examples(lengths, count, seed=seed)
        with atomic_path(path) as temporary:
            torch.save({"sequences": examples.sequences, "answers": examples.answers}, temporary)
    return Examples(**torch.load(path))
