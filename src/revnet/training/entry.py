"""The entry functions `train` and `resume`, and the three families that they know."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, overload

from lightning.pytorch import Callback

from revnet.errors import CheckpointError
from revnet.training.atomic_file import remove_leftovers
from revnet.training.classification import job as classification
from revnet.training.classification.config import TrainConfig
from revnet.training.classification.result import TrainResult
from revnet.training.density import job as density
from revnet.training.density.config import NiceConfig
from revnet.training.density.result import DensityResult
from revnet.training.language import job as language
from revnet.training.language.config import LanguageConfig
from revnet.training.language.result import LanguageResult
from revnet.training.processes.choose import choose_world
from revnet.training.processes.join import broadcast, joined
from revnet.training.processes.launch import run_in_processes
from revnet.training.processes.world import current_world
from revnet.training.run import run_dir
from revnet.training.run.checkpoint import read_checkpoint, trained_part
from revnet.training.run.execute import execute
from revnet.training.run.job import AbstractJob
from revnet.training.run.run_result import RunResult
from revnet.training.saved_module import check_fit
from revnet.training.settings.run_config import AbstractRunConfig, read_task


@dataclass(frozen=True)
class _Family:
    config_type: type[AbstractRunConfig]
    """Dataclass of the settings."""
    new_job: Callable[[Any], AbstractJob[Any]]
    """Function that checks the settings of a new run and loads its data."""
    job_of_run: Callable[[Any], AbstractJob[Any]]
    """Function that does so for a run that was stopped."""


_FAMILIES: dict[str | None, _Family] = {  # by the `task` in the settings
    None: _Family(TrainConfig, classification.new_job, classification.job_of_run),
    "nice": _Family(NiceConfig, density.new_job, density.job_of_run),
    "lm": _Family(LanguageConfig, language.new_job, language.job_of_run),
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
    """Train a model, and write everything about the run to a new folder.

    The type of the settings decides what is trained: a classifier, a density of images, or a language model.

    The folder holds the settings (`config.yaml`), a row of figures per epoch (`metrics.csv`), the weights
    (`best.safetensors`, `last.safetensors`), the checkpoint to resume from (`last.ckpt`), the learning curve
    (`learning_curve.png`) and the final figures (`summary.json`). A run with a `memory_budget` adds its plan
    (`plan.txt`), a run with `drift_every` the drift of all blocks (`drift.csv`). Every file is written whole or not at
    all. The test set is read only at the end.

    With several `devices`, a process for each of them runs this function, and the caller waits. The processes do not
    run the caller's script. One of them writes the files.

    PyTorch's global random state is seeded with `config.seed`.

    Args:
        config: The settings: a `TrainConfig`, a `NiceConfig` or a `LanguageConfig`.
        quiet: Print nothing.
        callbacks: Additional callbacks for Lightning's Trainer. With several `devices`, each process has a copy, whose
            attributes stay in that process.

    Returns:
        The result, in every process that torchrun or SLURM has started.

    Raises:
        ValueError: The model or the data set is unknown, `out_dir` is not empty, or a setting does not fit the data.
        BudgetError: No plan fits the `memory_budget`.
        DataError: The data set is missing or corrupt.
        ProcessError: A process of a run on several devices was killed.
        TrainingInterrupted: Ctrl-C or SIGTERM came; `resume` continues from the last finished epoch.
    """
    world = choose_world(config.device, config.devices, config.num_nodes)
    if world.must_start:
        arguments = {"config": config, "quiet": quiet, "callbacks": list(callbacks)}
        return cast("RunResult", run_in_processes(train, arguments, world))
    with joined(world, config.device):
        family = next(family for family in _FAMILIES.values() if isinstance(config, family.config_type))
        job = family.new_job(config)
        is_main = current_world().is_main
        folder = run_dir.make_run_dir(job.config, job.names.data, job.names.model) if is_main else None
        return execute(job, broadcast(folder), None, quiet=quiet, callbacks=callbacks)


def resume(folder: str | Path, *, quiet: bool = False, callbacks: Sequence[Callback] = ()) -> RunResult:
    """Continue a run that was stopped, from its last finished epoch and with its own settings.

    On the CPU the result is the same, bit for bit, as if the run had never stopped.

    Args:
        folder: Folder of the run.
        quiet: Print nothing.
        callbacks: Additional callbacks for Lightning's Trainer; the checkpoint holds their state, if they have any.

    Returns:
        The result that `train` would have returned.

    Raises:
        CheckpointError: `folder` holds no run, a run that cannot be resumed, or a checkpoint of another model.
        DataError: The data set is missing or corrupt.
        TrainingInterrupted: Ctrl-C or SIGTERM came again.
    """
    folder = Path(folder)
    family = _find_family(folder)
    checkpoint = folder / run_dir.CHECKPOINT
    if not checkpoint.is_file():
        raise CheckpointError(
            f"`{folder}` holds no {run_dir.CHECKPOINT}, since no epoch was finished; start again with "
            f"`{family.config_type.command} --config {folder / run_dir.CONFIG}`."
        )
    config = family.config_type.load(folder / run_dir.CONFIG)
    world = choose_world(config.device, config.devices, config.num_nodes)
    if world.must_start:
        arguments = {"folder": folder, "quiet": quiet, "callbacks": list(callbacks)}
        return cast("RunResult", run_in_processes(resume, arguments, world))
    with joined(world, config.device):
        tensors = trained_part(read_checkpoint(checkpoint)).tensors
        job = family.job_of_run(config)
        check_fit(job.task.saved_module, tensors, checkpoint)
        if current_world().is_main:
            remove_leftovers(folder)
        return execute(job, folder, checkpoint, quiet=quiet, callbacks=callbacks)


def _find_family(folder: Path) -> _Family:
    path = folder / run_dir.CONFIG
    if not path.is_file():
        raise CheckpointError(f"`{folder}` holds no {run_dir.CONFIG}; pass the folder of a run of `revnet train`.")
    task = read_task(path)
    if task not in _FAMILIES:
        raise CheckpointError(f"`{path}` is for the task `{task}`, which this revnet does not know; update revnet.")
    return _FAMILIES[task]
