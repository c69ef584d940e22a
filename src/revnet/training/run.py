"""One training run: from settings to a folder with weights, log and picture."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from lightning.pytorch import Callback
from torch import nn

import revnet
from revnet._machine import describe_machine, process_peak_bytes
from revnet.data import (
    AbstractSplit,
    ImageDataset,
    ImageSplit,
    Loader,
    list_datasets,
    load_dataset,
    make_augment,
    make_color_distortion,
    make_loader,
    make_preprocess,
)
from revnet.errors import CheckpointError
from revnet.memory import Plan
from revnet.models import create_model
from revnet.training import _run_dir
from revnet.training._checkpoint import classifier_tensors, load_classifier, read_checkpoint
from revnet.training._files import atomic_path, remove_leftovers
from revnet.training._memory import apply_policies, count_peak_bytes, make_plan, tell_plan, tell_policy
from revnet.training._plot import plot_learning_curve
from revnet.training._progress import make_progress
from revnet.training._trainer import Stopped, check_device, fit, make_trainer
from revnet.training.callbacks import EpochLog, LastUpdate, RandomState, RunFiles, StepTimer
from revnet.training.classifier import Classifier, Header, check_fit
from revnet.training.config import TrainConfig
from revnet.training.evaluation import evaluate_on, usual_batch_size
from revnet.training.results import TrainResult, format_lines
from revnet.training.task import ClassificationTask


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
class _Job:
    """All that depends on settings and data, and nothing on disk."""

    config: TrainConfig
    dataset: ImageDataset
    training: AbstractSplit
    validation: AbstractSplit | None
    task: ClassificationTask
    plan: Plan | None


def train(config: TrainConfig, *, quiet: bool = False, callbacks: Sequence[Callback] = ()) -> TrainResult:
    """Train a model, and leave everything about it in a new folder.

    The folder holds the settings (`config.yaml`), a row of figures per epoch (`metrics.csv`), the weights
    (`best.safetensors`, `last.safetensors`), what it takes to resume (`last.ckpt`), the learning curve
    (`learning_curve.png`) and the closing figures (`summary.json`); with a `memory_budget` the plan for it too
    (`plan.txt`). None of them is ever half-written. The test set is read at the end only.

    PyTorch's global random state is seeded with `config.seed`.

    Args:
        config: The settings.
        quiet: Print nothing.
        callbacks: Further callbacks for Lightning's Trainer.

    Raises:
        ValueError: The model or the data set is unknown, `out_dir` is taken, or a setting does not fit the data.
        BudgetError: An update cannot be made to fit `memory_budget`.
        DataError: The data set is missing or corrupt.
        TrainingInterrupted: Ctrl-C or SIGTERM came; `resume` goes on from the last finished epoch.
    """
    with torch.device("meta"):
        model = create_model(config.model)  # an unknown name is told before the data are read, which may take a while
    if config.policy == "store" and not model.is_reversible:
        raise ValueError(f"`policy` (='store') is for reversible models; {config.model} stores its activations anyway.")
    dataset = _load(config)
    job = _prepare(replace(config, data=_absolute(config.data)), dataset)
    folder = _run_dir.make_run_dir(job.config, dataset.name)
    return _run_or_say_how_to_resume(job, folder, None, quiet, callbacks)


def resume(folder: str | Path, *, quiet: bool = False, callbacks: Sequence[Callback] = ()) -> TrainResult:
    """Go on with a run that was stopped, from its last finished epoch and with its own settings.

    On the CPU the result is the one that the run would have given without the stop, bit for bit.

    Args:
        folder: Where `train` left the run.
        quiet: Print nothing.
        callbacks: Further callbacks for Lightning's Trainer; their state is in the checkpoint if they have any.

    Raises:
        CheckpointError: `folder` holds no run, none that can be resumed, or a checkpoint of another model.
        DataError: The data set is missing or corrupt.
        TrainingInterrupted: Ctrl-C or SIGTERM came once more.
    """
    folder = Path(folder)
    config = _read_settings(folder)
    checkpoint = folder / _run_dir.CHECKPOINT
    tensors = classifier_tensors(read_checkpoint(checkpoint))
    job = _prepare(config, _load(config))
    check_fit(job.task.classifier, tensors, checkpoint)
    remove_leftovers(folder)
    return _run_or_say_how_to_resume(job, folder, checkpoint, quiet, callbacks)


def _absolute(data: str) -> str:
    """Make a folder's path good in any working directory, so that a run can be resumed and evaluated anywhere."""
    is_name = data in list_datasets() or data.startswith("hub:")
    return data if is_name else str(Path(data).expanduser().resolve())


def _load(config: TrainConfig) -> ImageDataset:
    return load_dataset(
        config.data, image_size=config.image_size, on_corrupt=config.on_corrupt, crop_area=config.crop_area
    )


def _read_settings(folder: Path) -> TrainConfig:
    if not (folder / _run_dir.CONFIG).is_file():
        raise CheckpointError(f"`{folder}` holds no {_run_dir.CONFIG}; pass the folder of a run of `revnet train`.")
    if not (folder / _run_dir.CHECKPOINT).is_file():
        raise CheckpointError(
            f"`{folder}` holds no {_run_dir.CHECKPOINT}, since no epoch was finished; start again with "
            f"`revnet train --config {folder / _run_dir.CONFIG}`."
        )
    return TrainConfig.load(folder / _run_dir.CONFIG)


def _prepare(config: TrainConfig, dataset: ImageDataset) -> _Job:
    is_decoded = not isinstance(dataset.train, ImageSplit)
    config = config.resolve(dataset.name, is_decoded=is_decoded)
    check_device(config.device)
    assert config.preprocess is not None
    assert config.crop_padding is not None
    assert config.horizontal_flip is not None
    training, validation = dataset.train, None
    if config.val_fraction > 0:
        training, validation = dataset.holdout(config.val_fraction, config.seed)
    if config.batch_size > len(training):
        raise ValueError(
            f"`batch_size` (={config.batch_size}) must not exceed the {len(training)} images that train; "
            "pass a smaller one."
        )
    header = Header(
        model=config.model,
        data=config.data,
        class_names=dataset.class_names,
        image_shape=(dataset.in_channels, *dataset.image_size),
        preprocess=config.preprocess,
        is_resized=is_decoded,
    )
    preprocess = make_preprocess(config.preprocess, dataset.train, dataset.test)
    distort = make_color_distortion() if config.color_distortion else nn.Identity()
    augment = make_augment(config.crop_padding, config.horizontal_flip, dataset.image_size, cutout=config.cutout)
    updates_per_epoch = len(training) // config.batch_size
    num_updates = min(config.epochs * updates_per_epoch, config.max_updates or sys.maxsize)
    config = replace(config, epochs=-(-num_updates // updates_per_epoch))
    plan = make_plan(config, header, preprocess)
    torch.manual_seed(config.seed)
    classifier = Classifier.create(header, preprocess)
    apply_policies(classifier.model, config, plan)
    task = ClassificationTask(classifier, distort, augment, config, num_updates)
    return _Job(config, dataset, training, validation, task, plan)


def _run_or_say_how_to_resume(
    job: _Job, folder: Path, checkpoint: Path | None, quiet: bool, callbacks: Sequence[Callback]
) -> TrainResult:
    try:
        with _threads(job.config.num_threads):
            return _run(job, folder, checkpoint, quiet, callbacks)
    except KeyboardInterrupt as stop:
        message = f"stopped; `revnet train --resume {folder}` goes on after the last finished epoch."
        if not (folder / _run_dir.CHECKPOINT).is_file():
            settings = folder / _run_dir.CONFIG
            message = f"stopped before an epoch was finished; `revnet train --config {settings}` starts again."
        raise TrainingInterrupted(message, stop.signal_number if isinstance(stop, Stopped) else signal.SIGINT) from stop


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(job: _Job, folder: Path, checkpoint: Path | None, quiet: bool, callbacks: Sequence[Callback]) -> TrainResult:
    """Train, then look at what came out."""
    log, files = EpochLog(folder / _run_dir.LOG), RunFiles(folder)
    ours: list[Callback] = [RandomState(), LastUpdate(job.task.num_updates), StepTimer(), log, files]
    if not quiet:
        ours.append(make_progress())
    trainer = make_trainer(job.config, [*ours, *callbacks], folder)
    device = trainer.strategy.root_device
    if job.plan is not None:
        with atomic_path(folder / _run_dir.PLAN) as temporary:
            temporary.write_text(f"{job.plan.report()}\n")
    if not quiet:
        print(_heading(job, folder, device), flush=True)
    fit(trainer, job.task, *_make_loaders(job, device), ckpt_path=checkpoint)

    plot_learning_curve(log.rows, folder / _run_dir.PICTURE, f"{job.config.model} on {job.dataset.name}")
    classifier, dataset, num_workers = job.task.classifier, job.dataset, job.config.num_workers
    assert num_workers is not None
    best = load_classifier(folder / _run_dir.BEST_WEIGHTS) if files.best_val_accuracy is not None else None
    peak_bytes, stored_peak_bytes = count_peak_bytes(classifier, job.config)
    result = TrainResult(
        folder=folder,
        test=evaluate_on(dataset, classifier, device, num_workers=num_workers),
        best_test=None if best is None else evaluate_on(dataset, best, device, num_workers=num_workers),
        best_epoch=files.best_epoch,
        best_val_accuracy=files.best_val_accuracy,
        num_updates=trainer.global_step,
        train_seconds=sum(row["epoch_seconds"] for row in log.rows),
        step_seconds=median(row["step_seconds"] for row in log.rows),
        batch_size=job.config.batch_size,
        peak_bytes=peak_bytes,
        stored_peak_bytes=stored_peak_bytes,
        policy=tell_policy(job.config, job.plan, is_stored=stored_peak_bytes is None),
        memory_budget_bytes=None if job.plan is None else job.plan.budget_bytes,
        planned_peak_bytes=None if job.plan is None else job.plan.peak_bytes,
        process_peak_bytes=process_peak_bytes(device),
        machine=describe_machine(f"revnet train --config {_run_dir.CONFIG}", device=device),
    )
    result.save(folder / _run_dir.SUMMARY)
    return result


def _make_loaders(job: _Job, device: torch.device) -> tuple[Loader, Loader | None]:
    config = job.config
    assert config.num_workers is not None
    loader = partial(make_loader, seed=config.seed, pin_memory=device.type == "cuda", num_workers=config.num_workers)
    # All updates are of the same size, so that they weigh the same.
    training = loader(job.training, batch_size=config.batch_size, shuffle=True, drop_last=True)
    if job.validation is None:
        return training, None
    return training, loader(job.validation, batch_size=usual_batch_size(job.dataset.image_size), shuffle=False)


def _heading(job: _Job, folder: Path, device: torch.device) -> str:
    config, dataset, classifier = job.config, job.dataset, job.task.classifier
    num_parameters = sum(parameter.numel() for parameter in classifier.model.parameters())
    shape = "x".join(map(str, classifier.header.image_shape))
    parts = {"train": job.training, "validate": job.validation, "test": dataset.test}
    counts = ", ".join(f"{len(part):,} {verb}" for verb, part in parts.items() if part is not None)
    lines = [
        ("revnet", revnet.__version__),
        ("model", f"{config.model}, {num_parameters:,} parameters"),
        ("data", f"{dataset.name}, {dataset.num_classes} classes, images of {shape}: {counts}"),
        ("epochs", f"{config.epochs}, {job.task.num_updates:,} updates of {config.batch_size} images"),
        ("device", f"{device}, {config.precision}"),
    ]
    if job.plan is not None:
        lines.append(("memory", tell_plan(job.plan)))
    return format_lines([*lines, ("folder", str(folder))])
