"""Confusions: how often a classifier takes one class for another."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from revnet._atomic_file import write_csv
from revnet._outside_text import csv_cell


@dataclass(frozen=True)
class ClassErrors:
    """Errors of a classifier on the images of one class."""

    name: str
    """Name of the class."""

    num_images: int
    """Number of images of the class, at least one."""

    num_errors: int
    """Number of images that were assigned to another class."""

    @property
    def error(self) -> float:
        """Share of wrong answers."""
        return self.num_errors / self.num_images


class Mistake(NamedTuple):
    """One class taken for another."""

    truth: str
    """Name of the true class."""

    answer: str
    """Name of the class that the classifier answered."""

    num_images: int
    """Number of images with this mistake."""


@dataclass(frozen=True, eq=False, repr=False)
class Confusion:
    """Counts of images by true class and answered class.

    Raises:
        ValueError: `counts` is not int64, or does not have a row and a column for each name.
    """

    counts: Tensor
    """Number of images of class `i` that were assigned to class `j`: (K, K), int64."""

    class_names: Sequence[str]
    """Names of the K classes."""

    def __post_init__(self) -> None:
        num_classes = len(self.class_names)
        if self.counts.shape != (num_classes, num_classes) or self.counts.dtype != torch.int64:
            raise ValueError(
                f"`counts` (of shape {tuple(self.counts.shape)}, {self.counts.dtype}) must be int64 with a row and a "
                f"column for each of the {num_classes} `class_names`."
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Confusion):
            return NotImplemented
        return tuple(self.class_names) == tuple(other.class_names) and torch.equal(self.counts, other.counts)

    def __hash__(self) -> int:
        return hash((tuple(self.class_names), self.num_images, self.num_errors))

    def __repr__(self) -> str:
        return f"Confusion(num_classes={len(self.class_names)}, num_images={self.num_images})"

    @property
    def num_images(self) -> int:
        """Number of images."""
        return int(self.counts.sum())

    @property
    def num_errors(self) -> int:
        """Number of images that were assigned to a wrong class."""
        return self.num_images - int(self.counts.trace())

    def per_class(self) -> list[ClassErrors]:
        """Return the errors of every class that has images, in the order of the classes."""
        totals, hits = self.counts.sum(dim=1).tolist(), self.counts.diagonal().tolist()
        rows = zip(self.class_names, totals, hits, strict=True)
        return [ClassErrors(name, total, total - hit) for name, total, hit in rows if total > 0]

    def mistakes(self, limit: int) -> list[Mistake]:
        """Return the `limit` most frequent mistakes; equally frequent ones are in the order of the classes."""
        wrong = (self.counts - self.counts.diagonal().diag()).flatten()
        counts, cells = wrong.sort(descending=True, stable=True)
        most_frequent = zip(cells[:limit].tolist(), counts[:limit].tolist(), strict=True)
        names, num_classes = self.class_names, len(self.class_names)
        return [Mistake(names[cell // num_classes], names[cell % num_classes], n) for cell, n in most_frequent if n > 0]

    def save_csv(self, path: Path) -> None:
        """Write a CSV file with a row for every class that has images: its errors, and its count of each answer."""
        head = ["class", "images", "errors", "error", *(f"as {csv_cell(name)}" for name in self.class_names)]
        counts = [row for row in self.counts.tolist() if any(row)]
        rows = [
            [csv_cell(errors.name), errors.num_images, errors.num_errors, errors.error, *row]
            for errors, row in zip(self.per_class(), counts, strict=True)
        ]
        write_csv(path, [head, *rows])
