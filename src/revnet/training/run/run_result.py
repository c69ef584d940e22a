"""The result of any training run: its costs and its files, printed and saved."""

import json
import platform
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch

import revnet
from revnet._atomic_file import write_text
from revnet._text_table import format_lines
from revnet._units import counted_samples, format_seconds
from revnet.memory import format_bytes
from revnet.training.run import run_dir
from revnet.training.run.state_bytes import StateBytes

_PARTICIPLES = {"reverse": "reversible", "checkpoint": "checkpointed", "store": "stored", "plan": "planned"}


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """Costs and files of a run."""

    folder: Path
    """Folder with the weights, the log and the picture."""

    best_epoch: int
    """Epoch of the best weights: the best in validation, or the last without validation."""

    last_epoch: int
    """Epoch of the last weights."""

    num_updates: int
    """Number of updates."""

    train_seconds: float
    """Time of all epochs, validation included."""

    step_seconds: float
    """Median time of an update."""

    batch_size: int
    """Images, or windows of text, per update."""

    accumulate: int = 1
    """Number of parts in which an update processes its batch."""

    peak_bytes: int | None
    """Peak activation memory of an update, or of one part of it with `accumulate`; None if it cannot be counted, as in
    some models of your own."""

    stored_peak_bytes: int | None
    """Peak activation memory of the stored twin; None if the model stores all activations itself."""

    policy: str
    """Policy for activations: `reverse`, `checkpoint`, `store`, or `plan` for a run with a memory budget."""

    memory_budget_bytes: int | None
    """Memory budget of an update, if the run had one."""

    planned_peak_bytes: int | None
    """Peak memory of an update in the plan, including model, gradients and optimizer."""

    num_processes: int
    """Number of processes, each with a device of its own."""

    strategy: str | None
    """Division of the model among several processes: `ddp` or `fsdp2`."""

    state_bytes: StateBytes
    """Bytes of parameters, gradients and optimizer state in the main process."""

    process_peak_bytes: int | None = field(compare=False)
    """Peak memory of the process: resident on the CPU, by PyTorch's allocator on a GPU."""

    machine: list[str] = field(compare=False)
    """Lines that describe the hardware, the versions, the date and the command."""

    def as_arguments(self) -> dict[str, Any]:
        """Return the figures by name, as arguments of a `RunResult`."""
        return {entry.name: getattr(self, entry.name) for entry in fields(RunFigures)}


@dataclass(frozen=True, kw_only=True)
class RunResult(RunFigures, ABC):
    """Result of any training run: its costs, its files and, in a subclass, its scores."""

    samples: ClassVar[str] = "images"
    """Name of the samples in a batch."""

    @abstractmethod
    def _scores(self) -> list[tuple[str, str]]:
        """Return the scores as lines of two columns."""

    @abstractmethod
    def _score_entries(self) -> dict[str, Any]:
        """Return the scores as entries of the JSON file."""

    def report(self) -> str:
        """Return scores, costs and files as text of two columns."""
        samples = counted_samples(self.batch_size, self.samples)
        step_time = f"{format_seconds(self.step_seconds)}, median of updates of {samples}"
        lines = [
            *self._scores(),
            ("step time", step_time),
            *self._memory_lines(),
            ("weights", f"{self.folder / run_dir.LAST_WEIGHTS} (epoch {self.last_epoch})"),
            ("", f"{self.folder / run_dir.BEST_WEIGHTS} (epoch {self.best_epoch})"),
            ("log", str(self.folder / run_dir.LOG)),
            ("picture", str(self.folder / run_dir.PICTURE)),
        ]
        return format_lines(lines)

    def save(self, path: Path) -> None:
        """Write the figures, and the versions they were measured with, as JSON."""
        summary = self._score_entries() | {
            "last_epoch": self.last_epoch,
            "num_updates": self.num_updates,
            "train_seconds": self.train_seconds,
            "step_seconds": self.step_seconds,
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "peak_bytes": self.peak_bytes,
            "stored_peak_bytes": self.stored_peak_bytes,
            "policy": self.policy,
            "memory_budget_bytes": self.memory_budget_bytes,
            "planned_peak_bytes": self.planned_peak_bytes,
            "num_processes": self.num_processes,
            "strategy": self.strategy,
            "parameter_bytes": self.state_bytes.parameters,
            "gradient_bytes": self.state_bytes.gradients,
            "optimizer_bytes": self.state_bytes.optimizer,
            "process_peak_bytes": self.process_peak_bytes,
            "machine": self.machine,
            "versions": {
                "revnet": revnet.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "lightning": version("lightning"),
            },
        }
        write_text(path, json.dumps(summary, indent=2) + "\n")

    def _memory_lines(self) -> list[tuple[str, str]]:
        if self.peak_bytes is None:
            return []
        part = self.batch_size // self.num_processes
        where = "" if self.num_processes == 1 else f" in each of {self.num_processes} processes"
        per_step = f"at the peak of a step of {counted_samples(part, self.samples)}{where}"
        if self.accumulate > 1:
            per_step += f", in {self.accumulate} parts"
        lines = [("activation memory", f"{format_bytes(self.peak_bytes)} {per_step}, {_PARTICIPLES[self.policy]}")]
        if self.stored_peak_bytes is not None:
            ratio = self.stored_peak_bytes / self.peak_bytes
            twin = f"{format_bytes(self.stored_peak_bytes)} for the stored twin, {ratio:.1f} times as much"
            lines.append(("", twin))
        if self.num_processes > 1:
            names = ("parameters", "gradients", "optimizer state")
            parts = [f"{format_bytes(count)} {name}" for name, count in zip(names, self.state_bytes, strict=True)]
            lines.append(("state", f"{', '.join(parts)}, of process 0"))
        if self.memory_budget_bytes is not None and self.planned_peak_bytes is not None:
            planned = f"{format_bytes(self.planned_peak_bytes)} with model, gradients and optimizer"
            lines.append(("", f"{planned}, of a budget of {format_bytes(self.memory_budget_bytes)}"))
        return lines
