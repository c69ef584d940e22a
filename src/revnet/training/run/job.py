"""The interface between a run and the task that it trains."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from revnet._units import counted, counted_samples
from revnet.memory import Plan
from revnet.training.run.activation_memory import Update
from revnet.training.run.callbacks import Row
from revnet.training.run.data_record import DataRecord
from revnet.training.run.run_result import RunFigures, RunResult
from revnet.training.run.task import AbstractTask
from revnet.training.settings.run_config import AbstractRunConfig

Result = TypeVar("Result", bound=RunResult)


@dataclass(frozen=True, kw_only=True)
class RunNames:
    """Names of the parts of a run."""

    data: str
    """Name of the data, in logs and file names."""
    model: str
    """Name of the model, in logs and file names."""
    loss: str = "cross-entropy"
    """Name of the loss, on the learning curve."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of a finished run."""

    device: torch.device
    """Device that the run trained on."""
    rows: Sequence[Row]
    """The log, one row per epoch."""
    best_score: float | None
    """Score of the best epoch; None without validation."""
    figures: RunFigures
    """Figures that every result has."""


class AbstractJob(ABC, Generic[Result]):
    """Everything of a run that depends on the settings and the data; it writes no file."""

    config: AbstractRunConfig
    """Settings of the run."""
    names: RunNames
    """Names of its parts."""
    task: AbstractTask
    """The LightningModule to train."""
    update: Update
    """What a plan and a count of the memory need to know of an update."""
    plan: Plan | None
    """Plan of policies for the memory budget, if there is one."""
    start: str | None = None
    """Trained weights that the run started from, as text; None for random weights."""
    drift_every: int | None = None
    """Updates from one measurement of drift to the next; None measures nothing."""

    @abstractmethod
    def heading(self) -> list[tuple[str, str]]:
        """Return the lines printed before training: model, data, epochs."""

    @abstractmethod
    def record_data(self) -> DataRecord:
        """Return what the run remembers of its data."""

    @property
    def texts(self) -> Mapping[str, str]:
        """Texts of the files that this task adds to the folder of a run, by the names of the files."""
        return {}

    @abstractmethod
    def make_loaders(
        self, device: torch.device, *, rank: int = 0, num_processes: int = 1, num_parts: int = 1
    ) -> tuple[Iterable[Any], Iterable[Any] | None]:
        """Return the training batches, and the validation batches if there are any.

        Args:
            device: Device to train on.
            rank: Number of this process, from 0.
            num_processes: Number of processes that divide the batches.
            num_parts: Number of consecutive batches to cut a process's slice of a training batch into.
        """

    def describe_updates(self, samples: str, num_samples: int | None = None) -> str:
        """Return the numbers of epochs, updates and samples per update as text.

        Args:
            samples: Noun for the samples.
            num_samples: Number of training samples, to say how many an epoch leaves over; None does not say.
        """
        updates = counted(self.task.num_updates, "update")
        parts = f" in {self.config.accumulate} parts" if self.config.accumulate > 1 else ""
        left_over = 0 if num_samples is None else num_samples % self.config.batch_size
        rest = f"; each epoch leaves out {left_over:,} of {num_samples:,}, others each time" if left_over else ""
        return f"{self.config.epochs}, {updates} of {counted_samples(self.config.batch_size, samples)}{parts}{rest}"

    @abstractmethod
    def finish(self, folder: Path, outcome: Outcome) -> Result:
        """Compute the scores of the trained model, and return the result of the run."""
