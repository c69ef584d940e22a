"""Train a reversible model and its stored twin, and compare gradients during training."""

from dataclasses import dataclass, replace

import torch

from revnet.models import create_model
from revnet.paper.gradient_angle.callbacks import GradientAngle, TrainingCurve
from revnet.paper.gradient_angle.gradients import GradientError
from revnet.training import TrainConfig, TrainResult, train
from revnet.training.processes.choose import choose_world


@dataclass(frozen=True)
class TrainedRun:
    """One of the two runs."""

    result: TrainResult
    losses: list[float]
    """Loss of each update."""
    val_errors: dict[int, float]
    """Validation error of each epoch, by the number of updates before it. Empty without validation."""


@dataclass(frozen=True)
class AngleStudy:
    """All measurements."""

    config: TrainConfig
    errors: dict[int, list[GradientError]]
    """Measurements in the reversed run, by the number of updates before them."""
    reversed: TrainedRun
    stored: TrainedRun
    device: torch.device

    @property
    def runs(self) -> dict[str, TrainedRun]:
        """Both runs by name."""
        return {"reversed": self.reversed, "stored": self.stored}

    @property
    def groups(self) -> list[str]:
        """Names of the parts of the network, and `ALL`."""
        return [error.group for error in next(iter(self.errors.values()))]

    def errors_of(self, group: str) -> dict[int, GradientError]:
        """Return the measurements of one group, by the number of updates before them."""
        return {
            update: next(error for error in errors if error.group == group) for update, errors in self.errors.items()
        }


def measure_gradient_angle(config: TrainConfig, angle: GradientAngle, *, quiet: bool = False) -> AngleStudy:
    """Train a reversed and a stored network with the same settings and seed, and compare gradients in the reversed run.

    The runs are saved in the folders that `revnet train` uses.

    Args:
        config: Settings of both runs.
        angle: New callback that compares the gradients.
        quiet: Whether to print nothing.

    Raises:
        ValueError: The model is not reversible, or a setting is not allowed here.
        DataError: The data set is missing or corrupt.
        TrainingInterrupted: The process received Ctrl-C or SIGTERM.
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
    """Raise an error unless `config` can be used for both runs.

    Raises:
        ValueError: The model is unknown or not reversible, or a setting is given that the study chooses itself.
    """
    with torch.device("meta"):
        model = create_model(config.model)
    if not model.is_reversible:
        raise ValueError(
            f"`model` (={config.model!r}) has no reversible block, so nothing is rebuilt; pass a reversible model, as "
            "listed by `revnet models`."
        )
    if config.policy != "reverse":
        raise ValueError(f"`policy` (={config.policy!r}) must not be set, since both policies are run; leave it out.")
    if config.memory_budget is not None:
        raise ValueError(
            f"`memory_budget` (={config.memory_budget!r}) must not be set, since one run rebuilds everything and the "
            "other nothing; leave it out."
        )
    if choose_world(config.device, config.devices, config.num_nodes).num_processes > 1:
        raise ValueError(
            f"`devices` (={config.devices!r}) must be 1, since the study collects its figures in this process; "
            "leave it out, and start a single process."
        )
    if config.out_dir is not None:
        raise ValueError(f"`out_dir` (={config.out_dir!r}) must not be set, since there are two runs; leave it out.")
