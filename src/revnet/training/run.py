"""One training run, whatever is trained: from settings to a folder with weights, log and picture."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, overload

import torch
from lightning.pytorch import Callback

import revnet
from revnet._memory_readings import process_peak_bytes
from revnet._provenance import describe_machine
from revnet.errors import CheckpointError
from revnet.training import _run_dir, classification, density_job, language_job
from revnet.training._checkpoint import read_checkpoint, trained_part
from revnet.training._files import atomic_path, remove_leftovers
from revnet.training._job import AbstractJob, Outcome
from revnet.training._memory import tell_plan, tell_policy
from revnet.training._plot import plot_learning_curve
from revnet.training._product import check_fit
from revnet.training._progress import make_progress
from revnet.training._settings import task_of
from revnet.training._trainer import Stopped, fit, make_trainer
from revnet.training.callbacks import EpochLog, GuardState, LastUpdate, RandomState, RunFiles, StepTimer
from revnet.training.config import TrainConfig
from revnet.training.density_result import DensityResult
from revnet.training.drift_monitor import DriftMonitor
from revnet.training.language_config import LanguageConfig
from revnet.training.language_result import LanguageResult
from revnet.training.nice_config import NiceConfig
from revnet.training.results import TrainResult
from revnet.training.run_result import RunResult, format_lines


class TrainingInterrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C or SIGTERM; the message says how to go on.

    Args:
        message: How to go on.
        signal_number: The signal that came.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


@dataclass(frozen=True)
class _Task:
    """A kind of training."""

    settings: type[Any]
    """The dataclass of its settings."""
    new_job: Callable[[Any], AbstractJob[Any]]
    """Checks the settings of a new run, and loads its data."""
    job_of_run: Callable[[Any], AbstractJob[Any]]
    """The same for a run that was stopped."""


_TASKS: dict[str | None, _Task] = {  # by the `task` in the settings
    None: _Task(TrainConfig, classification.new_job, classification.job_of_run),
    "nice": _Task(NiceConfig, density_job.new_job, density_job.job_of_run),
    "lm": _Task(LanguageConfig, language_job.new_job, language_job.job_of_run),
}


@overload
def train(config: TrainConfig, *, quiet: bool = False, callbacks: Sequence[Callback] = ()) -> TrainResult: ...
@overload
def train(config: NiceConfig, *, quiet: bool = False, callbacks: Sequence[Callback] = ()) -> DensityResult: ...
@overload
def train(config: LanguageConfig, *, quiet: bool = False, callbacks: Sequence[Callback] = ()) -> LanguageResult: ...
def train(
    config: TrainConfig | NiceConfig | LanguageConfig, *, quiet: bool = False, callbacks: Sequence[Callback] = ()
) -> RunResult:
    """Train a model, and leave everything about it in a new folder.

    What is trained follows from the kind of the settings: a classifier, a density of images, or a language model.

    The folder holds the settings (`config.yaml`), a row of figures per epoch (`metrics.csv`), the weights
    (`best.safetensors`, `last.safetensors`), what it takes to resume (`last.ckpt`), the learning curve
    (`learning_curve.png`) and the closing figures (`summary.json`); with a `memory_budget` the plan for it too
    (`plan.txt`), with `drift_every` the drift of all blocks (`drift.csv`). None of them is ever half-written. The test
    set is read at the end only.

    PyTorch's global random state is seeded with `config.seed`.

    Args:
        config: The settings: a `TrainConfig`, a `NiceConfig` or a `LanguageConfig`.
        quiet: Print nothing.
        callbacks: Further callbacks for Lightning's Trainer.

    Raises:
        ValueError: The model or the data set is unknown, `out_dir` is taken, or a setting does not fit the data.
        BudgetError: An update cannot be made to fit `memory_budget`.
        DataError: The data set is missing or corrupt.
        TrainingInterrupted: Ctrl-C or SIGTERM came; `resume` goes on from the last finished epoch.
    """
    task = next(task for task in _TASKS.values() if isinstance(config, task.settings))
    job = task.new_job(config)
    folder = _run_dir.make_run_dir(job.config, job.names.data, job.names.model)
    return _run_or_say_how_to_resume(job, folder, None, quiet, callbacks)


def resume(folder: str | Path, *, quiet: bool = False, callbacks: Sequence[Callback] = ()) -> RunResult:
    """Go on with a run that was stopped, from its last finished epoch and with its own settings.

    On the CPU the result is the one that the run would have given without the stop, bit for bit.

    Args:
        folder: Where `train` left the run.
        quiet: Print nothing.
        callbacks: Further callbacks for Lightning's Trainer; their state is in the checkpoint if they have any.

    Returns:
        What `train` would have returned.

    Raises:
        CheckpointError: `folder` holds no run, none that can be resumed, or a checkpoint of another model.
        DataError: The data set is missing or corrupt.
        TrainingInterrupted: Ctrl-C or SIGTERM came once more.
    """
    folder = Path(folder)
    task = _find_task(folder)
    checkpoint = folder / _run_dir.CHECKPOINT
    if not checkpoint.is_file():
        raise CheckpointError(
            f"`{folder}` holds no {_run_dir.CHECKPOINT}, since no epoch was finished; start again with "
            f"`{_command(task)} --config {folder / _run_dir.CONFIG}`."
        )
    config = _TASKS[task].settings.load(folder / _run_dir.CONFIG)
    tensors = trained_part(read_checkpoint(checkpoint)).tensors
    job = _TASKS[task].job_of_run(config)
    check_fit(job.task.product, tensors, checkpoint)
    remove_leftovers(folder)
    return _run_or_say_how_to_resume(job, folder, checkpoint, quiet, callbacks)


def _find_task(folder: Path) -> str | None:
    path = folder / _run_dir.CONFIG
    if not path.is_file():
        raise CheckpointError(f"`{folder}` holds no {_run_dir.CONFIG}; pass the folder of a run of `revnet train`.")
    task = task_of(path)
    if task not in _TASKS:
        raise CheckpointError(f"`{path}` is for the task `{task}`, which this revnet does not know; update revnet.")
    return task


def _command(task: str | None) -> str:
    return f"revnet train {task}" if task else "revnet train"


def _run_or_say_how_to_resume(
    job: AbstractJob[Any], folder: Path, checkpoint: Path | None, quiet: bool, callbacks: Sequence[Callback]
) -> Any:
    try:
        with _threads(job.config.num_threads):
            return _run(job, folder, checkpoint, quiet, callbacks)
    except KeyboardInterrupt as stop:
        message = f"stopped; `revnet train --resume {folder}` goes on after the last finished epoch."
        if not (folder / _run_dir.CHECKPOINT).is_file():
            settings = folder / _run_dir.CONFIG
            message = f"stopped before an epoch was finished; `{job.names.command} --config {settings}` starts again."
        raise TrainingInterrupted(message, stop.signal_number if isinstance(stop, Stopped) else signal.SIGINT) from stop


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(
    job: AbstractJob[Any], folder: Path, checkpoint: Path | None, quiet: bool, callbacks: Sequence[Callback]
) -> Any:
    """Train, then look at what came out."""
    log, files = EpochLog(folder / _run_dir.LOG), RunFiles(folder, job.task.criterion)
    ours: list[Callback] = [RandomState(), GuardState(), LastUpdate(job.task.num_updates), StepTimer(), log, files]
    if job.drift_every is not None:
        ours.insert(0, DriftMonitor(job.drift_every, path=folder / _run_dir.DRIFT))
    if not quiet:
        ours.append(make_progress())
    trainer = make_trainer(
        job.config, [*ours, *callbacks], folder, num_epochs=job.num_epochs, max_grad_norm=job.max_grad_norm
    )
    device = trainer.strategy.root_device
    if job.plan is not None:
        with atomic_path(folder / _run_dir.PLAN) as temporary:
            temporary.write_text(f"{job.plan.report()}\n")
    if not quiet:
        print(_heading(job, folder, device), flush=True)
    fit(trainer, job.task, *job.make_loaders(device), ckpt_path=checkpoint)

    names = job.names
    plot_learning_curve(log.rows, folder / _run_dir.PICTURE, f"{names.model} on {names.data}", loss_name=names.loss)
    peak_bytes, stored_peak_bytes = job.count_peak_bytes()
    common = {
        "folder": folder,
        "best_epoch": files.best_epoch,
        "num_updates": trainer.global_step,
        "train_seconds": sum(row["epoch_seconds"] for row in log.rows),
        "step_seconds": median(row["step_seconds"] for row in log.rows),
        "batch_size": job.batch_size,
        "peak_bytes": peak_bytes,
        "stored_peak_bytes": stored_peak_bytes,
        "policy": tell_policy(job.config, job.plan, is_stored=stored_peak_bytes is None),
        "memory_budget_bytes": None if job.plan is None else job.plan.budget_bytes,
        "planned_peak_bytes": None if job.plan is None else job.plan.peak_bytes,
        "process_peak_bytes": process_peak_bytes(device),
        "machine": describe_machine(f"{names.command} --config {_run_dir.CONFIG}", device=device),
    }
    result = job.finish(folder, Outcome(device=device, rows=log.rows, best_score=files.best_score, common=common))
    result.save(folder / _run_dir.SUMMARY)
    return result


def _heading(job: AbstractJob[Any], folder: Path, device: torch.device) -> str:
    lines = [
        ("revnet", revnet.__version__),
        *job.heading(),
        ("device", f"{device}, {job.config.precision}"),
    ]
    if job.plan is not None:
        lines.append(("memory", tell_plan(job.plan)))
    return format_lines([*lines, ("folder", str(folder))])
