"""The job of a run that trains a classifier on data of the user's own."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from revnet.data import make_augment, make_preprocess
from revnet.memory import Plan
from revnet.training.classification.build import build_classifier
from revnet.training.classification.config import TrainConfig
from revnet.training.classification.model import NO_PREPROCESS, ClassifierHeader, load_classifier
from revnet.training.classification.own_data import OwnBatches, OwnData, load_own_data
from revnet.training.classification.own_model import own_network
from revnet.training.classification.rand_augment import make_distortion
from revnet.training.classification.result import TrainResult
from revnet.training.classification.start import preprocess_of
from revnet.training.classification.task import ClassificationTask
from revnet.training.device import find_device
from revnet.training.evaluation.evaluate import evaluate_batches
from revnet.training.processes.world import current_world
from revnet.training.run import run_dir
from revnet.training.run.activation_memory import Update
from revnet.training.run.data_record import DataRecord
from revnet.training.run.job import AbstractJob, Outcome, RunNames
from revnet.training.starting import StartWeights, read_start_weights


@dataclass(frozen=True, eq=False, kw_only=True)
class OwnDataJob(AbstractJob[TrainResult]):
    """Job of a run that trains a classifier on data of the user's own."""

    config: TrainConfig
    names: RunNames
    task: ClassificationTask
    plan: Plan | None
    data: OwnData
    updates_per_epoch: int
    update: Update
    start: str | None
    drift_every: int | None

    def heading(self) -> list[tuple[str, str]]:
        """Return the lines printed before training: model, data, epochs."""
        data, classifier = self.data, self.task.classifier
        num_parameters = sum(parameter.numel() for parameter in classifier.model.parameters())
        shape = "x".join(map(str, data.image_shape))
        return [
            ("model", f"{self.config.model}, {num_parameters:,} parameters"),
            ("data", f"{self.config.data}, {len(data.class_names)} classes, images of {shape}"),
            ("epochs", self.describe_updates("images")),
        ]

    def record_data(self) -> DataRecord:
        """Return what the run remembers of its data."""
        names = {f"name of class {number}": name for number, name in enumerate(self.data.class_names)}
        return {"number of classes": len(self.data.class_names), **names}

    def make_loaders(
        self, device: torch.device, *, rank: int = 0, num_processes: int = 1, num_parts: int = 1
    ) -> tuple[OwnBatches, Any | None]:
        """Return the training batches, of a single process, and the validation batches."""
        training = OwnBatches(self.data.training, self.updates_per_epoch, num_parts, self.config.seed)
        return training, self.data.validation

    def finish(self, folder: Path, outcome: Outcome) -> TrainResult:
        """Evaluate the last weights, and the best if there was a validation, on the test batches."""
        classifiers = [self.task.classifier]
        if outcome.best_score is not None:
            own = own_network(self.task.classifier.header)
            classifiers.append(load_classifier(folder / run_dir.BEST_WEIGHTS, model=own))
        results = [
            evaluate_batches(classifier, self.data.test, data=self.data.name, device=outcome.device)
            for classifier in classifiers
        ]
        return TrainResult(
            test=results[0],
            best_test=results[1] if len(results) > 1 else None,
            best_val_accuracy=outcome.best_score,
            **outcome.figures.as_arguments(),
        )


def job_of_own_data(config: TrainConfig) -> OwnDataJob:
    """Make the job of a run, new or stopped, whose `data` are an import path.

    Raises:
        ValueError: The data do not have the right form, or a setting does not go with them.
        UserCodeError: The user's code failed.
    """
    find_device(config.device)
    if current_world().num_processes > 1:
        raise ValueError(
            f"`data` (={config.data!r}) is your own data module, whose batches are not divided among processes; use "
            "one device, or a data set by its name or folder."
        )
    data = load_own_data(config)
    _check_settings(config, data)
    updates_per_epoch = _count_batches(config.data, data.training) // config.accumulate
    if updates_per_epoch == 0:
        raise ValueError(
            f"`accumulate` (={config.accumulate}) is more than the batches of an epoch of `data` (={config.data!r}); "
            "pass a smaller one."
        )
    config = replace(config, batch_size=data.batch_size * config.accumulate)
    config = config.resolve_rate(is_decoded=False)
    config, num_updates = config.limit_updates(updates_per_epoch)
    start = None if config.weights is None else read_start_weights(config.weights, ClassifierHeader)
    kind, preprocess = _make_preprocess(config, data, start)
    header = ClassifierHeader(
        model=config.model,
        data=config.data,
        class_names=data.class_names,
        image_shape=data.image_shape,
        preprocess=kind,
        is_exact=config.exact,
    )
    image_size = data.image_shape[1:]
    distort = make_distortion(config, header.in_channels)
    augment = make_augment(config.crop_padding or 0, config.horizontal_flip or False, image_size, cutout=config.cutout)
    built = build_classifier(config, header, preprocess, start)
    weights = None if config.class_weights is None else torch.tensor(config.class_weights, dtype=torch.float32)
    return OwnDataJob(
        config=config,
        names=RunNames(data=data.name, model=config.model.rpartition(":")[2]),
        task=ClassificationTask(built.classifier, distort, augment, config, num_updates, class_weights=weights),
        plan=built.plan,
        data=data,
        updates_per_epoch=updates_per_epoch,
        update=built.update,
        start=built.start,
        drift_every=config.drift_every,
    )


def _make_preprocess(config: TrainConfig, data: OwnData, start: StartWeights | None) -> tuple[str, nn.Module]:
    if not data.is_encoded:
        return NO_PREPROCESS, nn.Identity()
    if config.preprocess is None and start is not None:
        return start.header.preprocess, preprocess_of(start, data.image_shape)
    kind = config.preprocess or ("imagenet" if data.image_shape[0] == 3 else "unit_range")
    split: Any = SimpleNamespace(image_shape=data.image_shape)
    return kind, make_preprocess(kind, split, split)


def _check_settings(config: TrainConfig, data: OwnData) -> None:
    for name in ("val_every", "patience"):
        if getattr(config, name) is not None and data.validation is None:
            raise ValueError(
                f"`{name}` (={getattr(config, name)}) needs a validation; give `data` (={config.data!r}) a "
                "`val_dataloader`, or leave it out."
            )
    if config.schedule == "plateau" and data.validation is None:
        raise ValueError(
            f"`schedule` (='plateau') needs a validation; give `data` (={config.data!r}) a `val_dataloader`, or pass "
            "another schedule."
        )
    if config.balanced_sampling or config.class_weights == "balanced":
        name = "balanced_sampling" if config.balanced_sampling else "class_weights"
        raise ValueError(
            f"`{name}` (={getattr(config, name)}) needs the classes of all images; your own data module can choose its "
            "images by a WeightedRandomSampler; leave it out."
        )
    if config.class_weights is not None and len(config.class_weights) != len(data.class_names):
        raise ValueError(
            f"`class_weights` (={list(config.class_weights)}) must be {len(data.class_names)} numbers, one for each "
            "class."
        )
    for name in ("color_distortion", "randaugment", "preprocess"):
        if data.is_encoded or not getattr(config, name):
            continue
        raise ValueError(
            f"`{name}` (={getattr(config, name)}) is for images of bytes (uint8), and `data` (={config.data!r}) yields "
            "floating point; leave it out."
        )
    if data.is_encoded and config.preprocess in ("standardize", "mean_image"):
        raise ValueError(
            f"`preprocess` (={config.preprocess!r}) needs all images in memory; pass imagenet or unit_range, or yield "
            "floating-point images."
        )


def _count_batches(data: str, loader: Any) -> int:
    try:
        return len(loader)
    except TypeError as error:
        raise ValueError(
            f"`data` (={data!r}) must have a training loader with a length, which gives the epochs their number of "
            "updates; define `__len__`."
        ) from error
