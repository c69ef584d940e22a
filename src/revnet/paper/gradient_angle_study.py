"""Train a reversible model and its stored twin, comparing gradients on the way."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from revnet.models import create_model
from revnet.paper.gradient_angle import GradientError
from revnet.paper.gradient_angle_callbacks import GradientAngle, TrainingCurve
from revnet.training import TrainConfig, TrainResult, train


@dataclass(frozen=True)
class TrainedRun:
    """One of the two runs."""

    result: TrainResult
    losses: list[float]
    """Of each update."""
    val_errors: dict[int, float]
    """Of each epoch, by the number of updates made before; none without validation."""


@dataclass(frozen=True)
class AngleStudy:
    """All that was measured."""

    config: TrainConfig
    errors: dict[int, list[GradientError]]
    """Of the reversed run, by the number of updates made before."""
    reversed: TrainedRun
    stored: TrainedRun
    device: torch.device

    @property
    def runs(self) -> dict[str, TrainedRun]:
        """Both runs by their names."""
        return {"reversed": self.reversed, "stored": self.stored}

    @property
    def groups(self) -> list[str]:
        """The parts of the network, and `ALL`."""
        return [error.group for error in next(iter(self.errors.values()))]

    def errors_of(self, group: str) -> dict[int, GradientError]:
        """Those of one group, by the number of updates made before."""
        return {
            update: next(error for error in errors if error.group == group) for update, errors in self.errors.items()
        }


def measure_gradient_angle(config: TrainConfig, angle: GradientAngle, *, quiet: bool = False) -> AngleStudy:
    """Train twice with the same settings and seed: reversed, where the gradients are compared, and stored.

    The runs are left where `revnet train` leaves them.

    Args:
        config: The settings of both runs.
        angle: What compares, new.
        quiet: Print nothing.

    Raises:
        ValueError: The model is not reversible, or a setting does not fit.
        DataError: The data set is missing or corrupt.
        TrainingInterrupted: Ctrl-C or SIGTERM came.
    """
    check_twins(config)
    curves = TrainingCurve(), TrainingCurve()
    reversed_result = train(config, quiet=quiet, callbacks=[angle, curves[0]])
    stored_result = train(replace(config, policy="store"), quiet=quiet, callbacks=[curves[1]])
    return AngleStudy(
        config,
        angle.errors,
        reversed=TrainedRun(reversed_result, curves[0].losses, curves[0].val_errors),
        stored=TrainedRun(stored_result, curves[1].losses, curves[1].val_errors),
        device=angle.device,
    )


def check_twins(config: TrainConfig) -> None:
    """Raise unless `config` is one for a reversed run and a stored one.

    Raises:
        ValueError: The model is unknown or not reversible, or there is a setting that the study makes itself.
    """
    with torch.device("meta"):
        model = create_model(config.model)
    if not model.is_reversible:
        raise ValueError(
            f"`model` (={config.model!r}) has no reversible block, so nothing of it is rebuilt; pass a reversible one: "
            "`revnet models` tells which are."
        )
    if config.policy != "reverse":
        raise ValueError(f"`policy` (={config.policy!r}) is not to be chosen: both are run; leave it out.")
    if config.memory_budget is not None:
        raise ValueError(
            f"`memory_budget` (={config.memory_budget!r}) plans what is rebuilt, and here it is everything or nothing; "
            "leave it out."
        )
    if config.out_dir is not None:
        raise ValueError(f"`out_dir` (={config.out_dir!r}) is for one run, and here are two; leave it out.")
