"""What every run gives back, whatever was trained: its costs and its files, on a screen and in a file."""

from __future__ import annotations

import json
import platform
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch

import revnet
from revnet._units import format_seconds
from revnet.memory import format_bytes
from revnet.training import _run_dir
from revnet.training._files import atomic_path

_HOW = {"reverse": "reversible", "checkpoint": "checkpointed", "store": "stored", "plan": "planned"}


@dataclass(frozen=True, kw_only=True)
class RunResult(ABC):
    """What came out of a run, whatever was trained: what it cost, and where its files are."""

    samples: ClassVar[str] = "images"
    """What a batch is of."""

    folder: Path
    """Where weights, log and picture are."""

    best_epoch: int
    """Epoch of the best weights: the best on validation, or the last if nothing was held out."""

    num_updates: int
    """Updates made."""

    train_seconds: float
    """Time of all epochs, validation included."""

    step_seconds: float
    """Median time of an update."""

    batch_size: int
    """Images, or windows of text, per update."""

    peak_bytes: int
    """Peak activation memory of an update."""

    stored_peak_bytes: int | None
    """The same of the twin that stores all activations, if the model does not."""

    policy: str
    """What was done with activations: `reverse`, `checkpoint`, `store`, or `plan` for what a budget asked for."""

    memory_budget_bytes: int | None
    """Most memory that an update was to take, if that was planned."""

    planned_peak_bytes: int | None
    """The most that it takes by the plan: model, gradients and optimizer included."""

    process_peak_bytes: int | None = field(compare=False)
    """The most memory that the process ever had: resident on the CPU, by PyTorch's allocator on a GPU."""

    machine: list[str] = field(compare=False)
    """Lines that say what hardware and which versions it was made with, when, and how."""

    @abstractmethod
    def _scores(self) -> list[tuple[str, str]]:
        """How good it is, in lines of two columns."""

    @abstractmethod
    def _figures(self) -> dict[str, Any]:
        """The same, for a file."""

    def report(self) -> str:
        """Say it on the screen."""
        step_time = f"{format_seconds(self.step_seconds)}, median of updates of {self.batch_size} {self.samples}"
        lines = [
            *self._scores(),
            ("step time", step_time),
            *self._memory_lines(),
            ("weights", str(self.folder / _run_dir.LAST_WEIGHTS)),
            ("", f"{self.folder / _run_dir.BEST_WEIGHTS} (epoch {self.best_epoch})"),
            ("log", str(self.folder / _run_dir.LOG)),
            ("picture", str(self.folder / _run_dir.PICTURE)),
        ]
        return format_lines(lines)

    def save(self, path: Path) -> None:
        """Write the figures, and the versions they were measured with, as JSON."""
        summary = self._figures() | {
            "num_updates": self.num_updates,
            "train_seconds": self.train_seconds,
            "step_seconds": self.step_seconds,
            "batch_size": self.batch_size,
            "peak_bytes": self.peak_bytes,
            "stored_peak_bytes": self.stored_peak_bytes,
            "policy": self.policy,
            "memory_budget_bytes": self.memory_budget_bytes,
            "planned_peak_bytes": self.planned_peak_bytes,
            "process_peak_bytes": self.process_peak_bytes,
            "machine": self.machine,
            "versions": {
                "revnet": revnet.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "lightning": version("lightning"),
            },
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n")

    def _memory_lines(self) -> list[tuple[str, str]]:
        per_step = f"at the peak of a step of {self.batch_size} {self.samples}"
        lines = [("activation memory", f"{format_bytes(self.peak_bytes)} {per_step}, {_HOW[self.policy]}")]
        if self.stored_peak_bytes is not None:
            ratio = self.stored_peak_bytes / self.peak_bytes
            twin = f"{format_bytes(self.stored_peak_bytes)} for the stored twin, {ratio:.1f} times as much"
            lines.append(("", twin))
        if self.memory_budget_bytes is not None and self.planned_peak_bytes is not None:
            planned = f"{format_bytes(self.planned_peak_bytes)} with model, gradients and optimizer"
            lines.append(("", f"{planned}, of a budget of {format_bytes(self.memory_budget_bytes)}"))
        return lines


def format_lines(lines: Sequence[tuple[str, str]]) -> str:
    """Put names and values into two columns."""
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)
