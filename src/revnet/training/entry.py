"""The entry functions `train` and `resume`, and the three families that they know."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, overload

from lightning.pytorch import Callback

from revnet._atomic_file import remove_leftovers
from revnet._checks import check_path, describe
from revnet._image_files import explain_link
from revnet._paths import absolute_path, expand_user
from revnet.errors import CheckpointError
from revnet.training.classification import job as classification
from revnet.training.classification.config import TrainConfig
from revnet.training.classification.result import TrainResult
from revnet.training.density import job as density
from revnet.training.density.config import NiceConfig
from revnet.training.density.result import DensityResult
from revnet.training.image_data import absolute_data
from revnet.training.language import job as language
from revnet.training.language.config import LanguageConfig
from revnet.training.language.result import LanguageResult
from revnet.training.processes.choose import choose_world
from revnet.training.processes.join import broadcast, joined
from revnet.training.processes.launch import run_in_processes
from revnet.training.processes.prepare_model import check_processes
from revnet.training.processes.world import current_world
from revnet.training.run import run_dir
from revnet.training.run.checkpoint import check_whole_state, trained_part
from revnet.training.run.checkpoint_folder import CheckpointFolder
from revnet.training.run.data_record import check_record, save_record
from revnet.training.run.execute import execute
from revnet.training.run.job import AbstractJob
from revnet.training.run.run_lock import lock_run
from revnet.training.run.run_result import RunResult
from revnet.training.run.save_checkpoints import check_length
from revnet.training.run.stopped_run import check_same_folder, errors_of_data, open_checkpoints
from revnet.training.saved_module import check_fit
from revnet.training.settings.fields import plain_value
from revnet.training.settings.resumable import change_settings, list_changes
from revnet.training.settings.run_config import AbstractRunConfig, read_task


@dataclass(frozen=True)
class _Family:
    config_type: type[AbstractRunConfig]
    """Dataclass of the settings."""
    new_job: Callable[[Any], AbstractJob[Any]]
    """Function that checks the settings of a new run and loads its data."""
    job_of_run: Callable[[Any], AbstractJob[Any]]
    """Function that does so for a run that was stopped."""
    locate: Callable[[str], str]
    """Function from the setting `data` to a name or an absolute path."""


_FAMILIES: dict[str | None, _Family] = {  # by the `task` in the settings
    None: _Family(TrainConfig, classification.new_job, classification.job_of_run, absolute_data),
    "nice": _Family(NiceConfig, density.new_job, density.job_of_run, absolute_data),
    "lm": _Family(LanguageConfig, language.new_job, language.job_of_run, absolute_path),
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
    (`best.safetensors`, `last.safetensors`), the checkpoints to resume from (`checkpoints`), what identifies the data
    (`data.json`), the learning curve (`learning_curve.png`) and the final figures (`summary.json`). A run with a
    `memory_budget` adds its plan (`plan.txt`), a run with `drift_every` the drift of all blocks (`drift.csv`). Every
    file is written whole or not at all. The test set is read only at the end.

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
        TypeError: `config` or `callbacks` are of another type.
        ValueError: The model or the data set is unknown, `out_dir` is not empty, or a setting does not fit the data.
        BudgetError: No plan fits the `memory_budget`.
        DataError: The data set is missing or corrupt.
        CheckpointError: A checkpoint cannot be written; the ones before it remain.
        ProcessError: A process of the run was killed, or memory ran out.
        TrainingInterrupted: Ctrl-C or SIGTERM came; a checkpoint was saved, from which `resume` continues. A second
            signal stops at once.
    """
    family = _family_of(config)
    check_callbacks(callbacks)
    world = choose_world(config.device, config.devices, config.num_nodes)
    check_processes(config, world)
    if world.must_start:
        arguments = {"config": config, "quiet": quiet, "callbacks": list(callbacks)}
        return cast("RunResult", run_in_processes(train, arguments, world))
    with joined(world, config.device):
        job = family.new_job(config)
        is_main = current_world().is_main
        folder = run_dir.make_run_dir(job.config, job.names.data, job.names.model) if is_main else None
        folder = broadcast(folder)
        with lock_run(folder):
            if is_main:
                run_dir.write_settings(job.config, folder)
                save_record(job.record_data(), folder / run_dir.DATA)
            return execute(job, folder, None, quiet=quiet, callbacks=callbacks)


def new_job(config: AbstractRunConfig) -> AbstractJob[Any]:
    """Check the settings of a new run and load its data."""
    return _family_of(config).new_job(config)


def check_config(config: Any) -> None:
    """Raise unless `config` holds the settings of a run.

    Raises:
        TypeError: It does not.
    """
    _family_of(config)


def check_callbacks(callbacks: Any) -> None:
    """Raise unless `callbacks` are Lightning's.

    Raises:
        TypeError: They are not.
    """
    if isinstance(callbacks, Sequence) and not isinstance(callbacks, str):
        wrong = [callback for callback in callbacks if not isinstance(callback, Callback)]
        if not wrong:
            return
        hint = f"pass `{wrong[0].__name__}()`" if isinstance(wrong[0], type) else "pass objects of this class"
        raise TypeError(
            f"`callbacks` holds {describe(wrong[0])}, but must hold objects of Lightning's Callback; {hint}."
        )
    hint = "put it in a list" if isinstance(callbacks, Callback) else "pass [] for none"
    raise TypeError(f"`callbacks` (={describe(callbacks)}) must be a list of Lightning's callbacks; {hint}.")


def _family_of(config: Any) -> _Family:
    for family in _FAMILIES.values():
        if isinstance(config, family.config_type):
            return family
    hint = "pass `TrainConfig(**settings)`, for instance" if isinstance(config, dict) else "pass one"
    raise TypeError(f"`config` (={describe(config)}) must be a TrainConfig, NiceConfig or LanguageConfig; {hint}.")


def resume(folder: str | Path, *, quiet: bool = False, callbacks: Sequence[Callback] = (), **changes: Any) -> RunResult:
    """Continue a run that was stopped, from its newest checkpoint, or from the beginning if it has none.

    On the CPU the result is the same, bit for bit, as if the run had never stopped, on the same number of processes. A
    run remembers its data, by names, labels and a fingerprint, and refuses others.

    Args:
        folder: Folder of the run.
        quiet: Print nothing.
        callbacks: Additional callbacks for Lightning's Trainer; the checkpoint holds their state, if they have any.
        changes: Settings to change for the rest of the run: where its data are (`data`), its length (`epochs`,
            `max_updates`), its highest rate (`lr`), devices, workers, memory (`policy`, `memory_budget`) and files
            (`save_every`, ...). They are saved, and printed.

    Returns:
        The result that `train` would have returned.

    Raises:
        CheckpointError: `folder` holds no run, a run that is going on, or checkpoints that cannot be read or that
            belong to another model; its checkpoints were deleted; or the data are not the ones of the run.
        ValueError: A setting cannot change, or not to that value.
        DataError: The data set is missing or corrupt.
        TrainingInterrupted: Ctrl-C or SIGTERM came again.

    Example:
        >>> import tempfile
        >>> from revnet.training import NiceConfig, resume, train
        >>> run = train(NiceConfig(epochs=1, out_dir=tempfile.mkdtemp()), quiet=True)
        >>> longer = resume(run.folder, epochs=2, quiet=True)
        >>> longer.num_updates == 2 * run.num_updates
        True
    """
    check_path("folder", folder, hint="the folder of a run of `revnet train`")
    check_callbacks(callbacks)
    folder = expand_user(folder)
    family = _find_family(folder)
    changes = {name: plain_value(value) for name, value in changes.items()}
    check_same_folder(folder, changes.pop("out_dir", None))
    if isinstance(changes.get("data"), str):
        changes["data"] = family.locate(changes["data"])
    before = family.config_type.load(folder / run_dir.CONFIG, whole=True)
    config = change_settings(before, changes)
    world = choose_world(config.device, config.devices, config.num_nodes)
    check_processes(config, world)
    if world.must_start:
        arguments = {"folder": folder, "quiet": quiet, "callbacks": list(callbacks), **changes}
        return cast("RunResult", run_in_processes(resume, arguments, world))
    with joined(world, config.device):
        if current_world().is_main:
            open_checkpoints(folder, config.command)
        with lock_run(folder):
            with errors_of_data(config.data):
                job = family.job_of_run(config)
            checkpoint = broadcast(_find_start(folder, job, quiet=quiet) if current_world().is_main else None)
            if current_world().is_main:
                if job.config != before:
                    job.config.save(folder / run_dir.CONFIG)
                for line in [] if quiet else list_changes(before, job.config):
                    print(f"changed  {line}")
            return execute(job, folder, checkpoint, quiet=quiet, callbacks=callbacks)


def _find_start(folder: Path, job: AbstractJob[Any], *, quiet: bool) -> Path | None:
    """Return the checkpoint that a run continues from, None for the beginning, once it is known to fit."""
    record, path = job.record_data(), folder / run_dir.DATA
    check_record(record, path, str(job.config.data))
    checkpoints = CheckpointFolder(folder / run_dir.CHECKPOINTS)
    newest = checkpoints.newest()
    if newest is not None:
        check_whole_state(newest.outline, newest.path)
        check_fit(job.task.saved_module, trained_part(newest.outline).tensors, newest.path)
        check_length(newest.outline, job.config, job.task.num_updates)
        for skipped in newest.unreadable:
            aside = checkpoints.set_aside(skipped)  # It would be one of the newest, which are not deleted.
            if not quiet:
                print(f"skipped  {skipped}, which cannot be read\nrenamed  {aside}")
    elif not path.exists():  # the run was killed just before
        save_record(record, path)
    remove_leftovers(folder)
    checkpoints.remove_leftovers()
    return None if newest is None else newest.path


def _find_family(folder: Path) -> _Family:
    path = folder / run_dir.CONFIG
    if not path.is_file():
        if (fault := explain_link(folder)) is not None:
            raise CheckpointError(f"`{folder}` {fault}.")
        fault = f"holds no {run_dir.CONFIG}" if folder.exists() else "does not exist"
        raise CheckpointError(f"`{folder}` {fault}; pass the folder of a run of `revnet train`.")
    task = read_task(path)
    if task not in _FAMILIES:
        raise CheckpointError(f"`{path}` is for the task `{task}`, which this revnet does not know; update revnet.")
    return _FAMILIES[task]
