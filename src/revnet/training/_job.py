"""What every task of training brings to a run, and what the run brings back to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from revnet.memory import Plan
from revnet.training._settings import RunSettings
from revnet.training._task import AbstractTask
from revnet.training.callbacks import Row
from revnet.training.run_result import RunResult

Result = TypeVar("Result", bound=RunResult)


@dataclass(frozen=True, kw_only=True)
class Names:
    """How a run is called."""

    command: str
    """What trains it: `revnet train`, or `revnet train nice`."""
    data: str
    """The data, in logs and file names."""
    model: str
    """The model, in logs and file names."""
    loss: str = "cross-entropy"
    """The loss, on the learning curve."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run that is over has come to, and left in its folder."""

    device: torch.device
    rows: Sequence[Row]
    """The log, a row per epoch."""
    best_score: float | None
    """What the criterion said of the best epoch; None without validation."""
    common: dict[str, Any]
    """The fields that every `RunResult` has."""


class AbstractJob(ABC, Generic[Result]):
    """All of a run that depends on settings and data, and nothing on disk."""

    config: RunSettings
    names: Names
    task: AbstractTask
    num_epochs: int
    batch_size: int
    plan: Plan | None
    """The policies within a budget of memory, if there is one."""
    max_grad_norm: float | None = None
    """What gradients are cut to; None leaves them alone."""
    drift_every: int | None = None
    """Updates from one measurement of drift to the next; None measures nothing."""

    @abstractmethod
    def heading(self) -> list[tuple[str, str]]:
        """What is told of model, data and epochs before it starts."""

    @abstractmethod
    def make_loaders(self, device: torch.device) -> tuple[Iterable[Any], Iterable[Any] | None]:
        """Batches that train, and batches that validate."""

    @abstractmethod
    def count_peak_bytes(self) -> tuple[int, int | None]:
        """Activations of an update, and with all of them stored if they are not."""

    @abstractmethod
    def finish(self, folder: Path, outcome: Outcome) -> Result:
        """Look at what came out."""
