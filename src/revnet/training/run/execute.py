"""Run a job from start to end: train, measure, and write the files of its folder."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from lightning.pytorch import Callback, Trainer

import revnet
from revnet._atomic_file import write_text
from revnet._figure import try_to_draw
from revnet._memory_readings import process_peak_bytes
from revnet._provenance import describe_machine
from revnet._text_table import format_lines
from revnet.errors import PredictionError
from revnet.training.drift_monitor import DriftMonitor
from revnet.training.freezing import describe_frozen
from revnet.training.processes.join import broadcast
from revnet.training.processes.prepare_model import model_preparation, strategy_name
from revnet.training.processes.statistics import share_statistics
from revnet.training.processes.world import current_world
from revnet.training.run import run_dir
from revnet.training.run.activation_memory import count_peak_bytes, describe_plan, policy_name
from revnet.training.run.callbacks import EpochLog, LastUpdate, MainStatistics, RunFiles, StepTimer
from revnet.training.run.captured_update import CapturedUpdate
from revnet.training.run.checkpoint_folder import CheckpointFolder, update_of
from revnet.training.run.execution import execution
from revnet.training.run.failures import explain
from revnet.training.run.job import AbstractJob, Outcome
from revnet.training.run.learning_curve import plot_learning_curve
from revnet.training.run.loggers import LoggedRun, describe_loggers
from revnet.training.run.process_state import ProcessState
from revnet.training.run.progress import make_progress
from revnet.training.run.rates import CurrentRates
from revnet.training.run.recipe_callbacks import recipe_callbacks
from revnet.training.run.run_result import RunFigures, RunResult
from revnet.training.run.save_checkpoints import SaveCheckpoints
from revnet.training.run.state_bytes import StateCounter
from revnet.training.run.stop_signals import SavedAndStopped, StopSignals
from revnet.training.run.trainer import fit, make_trainer
from revnet.training.run.update_log import UpdateLog
from revnet.training.settings.run_config import AbstractRunConfig
from revnet.training.settings.save_interval import parse_interval

_Result = TypeVar("_Result", bound=RunResult)


class TrainingInterrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C or SIGTERM; the message says how to continue.

    Args:
        message: How to continue.
        signal_number: The signal that stopped the run.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def execute(
    job: AbstractJob[_Result], folder: Path, checkpoint: Path | None, *, quiet: bool, callbacks: Sequence[Callback]
) -> _Result:
    """Run a job in its folder, from `checkpoint` on if there is one.

    Raises:
        TrainingInterrupted: Ctrl-C or SIGTERM came.
        CheckpointError: There is no room on the disk, or the folder was deleted.
        ProcessError: Memory ran out, or a process was killed.
    """
    try:
        with StopSignals() as signals, _threads(job.config.num_threads):
            return _execute(job, folder, checkpoint, signals, quiet, callbacks)
    except (SavedAndStopped, KeyboardInterrupt) as stop:
        number = getattr(stop, "signal_number", signal.SIGINT)
        raise TrainingInterrupted(_how_to_continue(folder, stop), number) from stop
    except Exception as error:
        explained = explain(error, folder)
        if explained is None:
            raise
        raise explained from error


def _how_to_continue(folder: Path, stop: BaseException) -> str:
    checkpoints = CheckpointFolder(folder / run_dir.CHECKPOINTS).all()
    start = f"after update {update_of(checkpoints[-1]):,}" if checkpoints else "from the beginning"
    how = "stopped" if isinstance(stop, SavedAndStopped) or not checkpoints else "stopped at once"
    return f"{how}; `revnet train --resume {folder}` continues {start}."


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _execute(
    job: AbstractJob[_Result],
    folder: Path,
    checkpoint: Path | None,
    signals: StopSignals,
    quiet: bool,
    callbacks: Sequence[Callback],
) -> _Result:
    counter = StateCounter()
    log, files = EpochLog(folder / run_dir.LOG), RunFiles(folder, job.task.best_epoch)
    updates = UpdateLog(folder / run_dir.UPDATE_LOG, every=job.config.log_every, batch_size=job.config.batch_size)
    ours: list[Callback] = [
        ProcessState(),
        CurrentRates(),
        MainStatistics(),
        LastUpdate(job.task.num_updates),
        StepTimer(job.config.batch_size),
        LoggedRun(job.config, folder),
        counter,
        updates,
        *recipe_callbacks(job.config, job.task, folder, quiet=quiet),
        log,
        files,
    ]
    checkpoints = CheckpointFolder(folder / run_dir.CHECKPOINTS)
    interval = parse_interval("save_every", job.config.save_every)
    ours.append(SaveCheckpoints(checkpoints, interval, job.config.keep_checkpoints, signals))
    if job.drift_every is not None:
        ours.insert(0, DriftMonitor(job.drift_every, path=folder / run_dir.DRIFT))
    world = current_world()
    is_main = world.is_main
    is_quiet = quiet or not is_main
    if not is_quiet:
        ours.append(make_progress())
    job.task.prepare_model = model_preparation(job.config)
    trainer = make_trainer(job.config, [*ours, *callbacks], folder)
    device = trainer.strategy.root_device
    if job.config.cuda_graphs:
        job.task.captured_update = CapturedUpdate(job.task.compute, job.task.saved_module.model)
    if job.plan is not None and is_main:
        write_text(folder / run_dir.PLAN, f"{job.plan.report()}\n")
    for name, text in job.texts.items() if is_main else ():
        write_text(folder / name, text)
    if not is_quiet:
        print(_heading(job, folder, device), flush=True)
    loaders = job.make_loaders(
        device, rank=world.rank, num_processes=world.num_processes, num_parts=job.config.accumulate
    )
    with execution(job.config, job.task.saved_module.model):
        fit(trainer, job.task, *loaders, ckpt_path=checkpoint)
    # Frees the memory of its graph.
    job.task.captured_update = None

    share_statistics(job.task.saved_module)
    names = job.names
    if is_main:
        title, picture = f"{names.model} on {names.data}", folder / run_dir.PICTURE
        try_to_draw(lambda: plot_learning_curve(log.rows, picture, title, loss_name=names.loss), picture)
    figures = broadcast(_figures(job, folder, trainer, log, files, counter) if is_main else None)
    result = job.finish(folder, Outcome(device=device, rows=log.rows, best_score=files.best_score, figures=figures))
    if is_main:
        result.save(folder / run_dir.SUMMARY)
    return result


def _figures(
    job: AbstractJob[_Result], folder: Path, trainer: Trainer, log: EpochLog, files: RunFiles, counter: StateCounter
) -> RunFigures:
    device = trainer.strategy.root_device
    try:
        peak_bytes, stored_peak_bytes = count_peak_bytes(job.task.saved_module.model, job.config, job.update)
    except PredictionError:  # a model of the user's own that needs the values of its tensors
        peak_bytes, stored_peak_bytes = None, None
    return RunFigures(
        folder=folder,
        best_epoch=files.best_epoch,
        last_epoch=int(log.rows[-1]["epoch"]),
        num_updates=trainer.global_step,
        train_seconds=sum(row["epoch_seconds"] for row in log.rows),
        step_seconds=median(row["step_seconds"] for row in log.rows),
        batch_size=job.config.batch_size,
        accumulate=job.config.accumulate,
        peak_bytes=peak_bytes,
        stored_peak_bytes=stored_peak_bytes,
        policy=policy_name(job.config, job.plan, is_stored=stored_peak_bytes is None),
        memory_budget_bytes=None if job.plan is None else job.plan.budget_bytes,
        planned_peak_bytes=None if job.plan is None else job.plan.peak_bytes,
        num_processes=current_world().num_processes,
        strategy=strategy_name(job.config),
        state_bytes=counter.counted,
        process_peak_bytes=process_peak_bytes(device),
        machine=describe_machine(f"{job.config.command} --config {run_dir.CONFIG}", device=device),
    )


def _devices(device: torch.device, config: AbstractRunConfig) -> str:
    world = current_world()
    if world.num_processes == 1:
        return str(device)
    nodes = f" on {world.num_nodes} nodes" if world.num_nodes > 1 else ""
    return f"{world.num_processes} {device.type} processes{nodes}, {strategy_name(config)}"


def _heading(job: AbstractJob[_Result], folder: Path, device: torch.device) -> str:
    lines = [("revnet", revnet.__version__), *job.heading()]
    if job.start is not None:
        lines.append(("weights", job.start))
    if job.config.freeze is not None:
        lines.append(("frozen", describe_frozen(job.task.saved_module.model)))
    lines.append(("device", f"{_devices(device, job.config)}, {job.config.precision}"))
    if job.plan is not None:
        lines.append(("memory", describe_plan(job.plan)))
    lines += [("logger", place) for place in describe_loggers(job.config, folder)]
    return format_lines([*lines, ("folder", str(folder))])
