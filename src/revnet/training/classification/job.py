"""The job of `revnet train`: train a classifier."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from revnet.data import ImageDataset, load_dataset, make_augment, make_loader, make_preprocess
from revnet.data.loading.loader import Loader
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.data.splits.image_split import ImageSplit
from revnet.memory import Plan
from revnet.models import create_model
from revnet.training.classification.balance import class_weights, sampling_weights
from revnet.training.classification.build import build_classifier
from revnet.training.classification.config import TrainConfig
from revnet.training.classification.model import Classifier, ClassifierHeader, load_classifier
from revnet.training.classification.own_job import job_of_own_data
from revnet.training.classification.own_model import own_network
from revnet.training.classification.rand_augment import make_distortion
from revnet.training.classification.result import TrainResult
from revnet.training.classification.start import preprocess_of
from revnet.training.classification.task import ClassificationTask
from revnet.training.device import find_device
from revnet.training.evaluation.evaluate import evaluate_on, usual_batch_size
from revnet.training.image_data import (
    absolute_data,
    check_batch_size,
    check_classes,
    describe_division,
    describe_splits,
    hold_out,
)
from revnet.training.import_path import is_import_path
from revnet.training.processes.prepare_model import check_devices
from revnet.training.processes.world import check_division
from revnet.training.run import run_dir
from revnet.training.run.activation_memory import Update
from revnet.training.run.checkpoint import read_weights
from revnet.training.run.data_record import DataRecord, record_images
from revnet.training.run.divided_state import is_divided, load_whole_state
from revnet.training.run.job import AbstractJob, Outcome, RunNames
from revnet.training.starting import absolute_weights, read_start_weights


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassificationJob(AbstractJob[TrainResult]):
    """Job of a run that trains a classifier."""

    config: TrainConfig
    names: RunNames
    task: ClassificationTask
    plan: Plan | None
    dataset: ImageDataset
    training: AbstractSplit
    validation: AbstractSplit | None
    update: Update
    start: str | None
    sampling_weights: Tensor | None
    drift_every: int | None

    def heading(self) -> list[tuple[str, str]]:
        """Return the lines printed before training: model, data, epochs."""
        dataset, classifier = self.dataset, self.task.classifier
        num_parameters = sum(parameter.numel() for parameter in classifier.model.parameters())
        shape = "x".join(map(str, classifier.header.image_shape))
        counts = describe_splits(self.training, self.validation, dataset.test)
        return [
            ("model", f"{self.config.model}, {num_parameters:,} parameters"),
            ("data", f"{dataset.name}, {dataset.num_classes} classes, images of {shape}: {counts}"),
            *describe_division(dataset),
            ("epochs", self.describe_updates("images", len(self.training))),
        ]

    def record_data(self) -> DataRecord:
        """Return what the run remembers of its data."""
        return record_images(self.dataset)

    def make_loaders(
        self, device: torch.device, *, rank: int = 0, num_processes: int = 1, num_parts: int = 1
    ) -> tuple[Loader, Loader | None]:
        """Return the training batches, all of one size so that updates weigh the same, and the validation batches."""
        config = self.config
        assert config.num_workers is not None
        loader = partial(
            make_loader,
            seed=config.seed,
            pin_memory=device.type == "cuda",
            num_workers=config.num_workers,
            rank=rank,
            num_processes=num_processes,
        )
        training = loader(
            self.training,
            batch_size=config.batch_size,
            shuffle=True,
            drop_last=True,
            num_parts=num_parts,
            keys=True,
            weights=self.sampling_weights,
        )
        if self.validation is None:
            return training, None
        batch_size = num_processes * usual_batch_size(self.dataset.image_size)
        return training, loader(self.validation, batch_size=batch_size, shuffle=False)

    def finish(self, folder: Path, outcome: Outcome) -> TrainResult:
        """Evaluate the last weights, and the best if there was a validation, on the test set."""
        assert self.config.num_workers is not None
        test = partial(evaluate_on, self.dataset, device=outcome.device, num_workers=self.config.num_workers)
        result, best_result = test(self.task.classifier), None
        if outcome.best_score is not None:
            best_result = test(self._best_classifier(folder / run_dir.BEST_WEIGHTS))
        return TrainResult(
            test=result,
            best_test=best_result,
            best_val_accuracy=outcome.best_score,
            **outcome.figures.as_arguments(),
        )

    def _best_classifier(self, path: Path) -> Classifier:
        if not is_divided(self.task.classifier):
            return load_classifier(path, model=own_network(self.task.classifier.header))
        # A whole classifier may not fit on one device.
        load_whole_state(self.task.classifier, read_weights(path).tensors)
        return self.task.classifier


def new_job(config: TrainConfig) -> AbstractJob[TrainResult]:
    """Check the settings of a new run and load its data."""
    config = replace(config, data=absolute_data(config.data), weights=absolute_weights(config.weights))
    if not is_import_path(config.model):
        _check_model(config)
    return job_of_run(config)


def job_of_run(config: TrainConfig) -> AbstractJob[TrainResult]:
    """Make the job of a run that was stopped, from the settings in its folder."""
    if is_import_path(config.data):
        return job_of_own_data(config)
    dataset = load_dataset(
        config.data,
        image_size=config.image_size,
        on_corrupt=config.on_corrupt,
        crop_area=config.crop_area,
        seed=config.seed,
    )
    return _prepare(config, dataset)


def _check_model(config: TrainConfig) -> None:
    """Raise unless revnet has the model, before the data are read, which may take a while."""
    with torch.device("meta"):
        model = create_model(config.model)
    check_devices(config, model, config.model)
    if config.policy == "store" and not model.is_reversible:
        raise ValueError(f"`policy` (='store') is for reversible models; {config.model} stores its activations anyway.")
    for name in ("exact", "tolerance", "drift_every"):
        if getattr(config, name) and not model.is_reversible:
            raise ValueError(
                f"`{name}` (={getattr(config, name)}) is for reversible models; {config.model} reconstructs nothing."
            )


def _prepare(config: TrainConfig, dataset: ImageDataset) -> ClassificationJob:
    is_decoded = not isinstance(dataset.train, ImageSplit)
    config = config.resolve(dataset.name, is_decoded=is_decoded)
    find_device(config.device)
    start = None if config.weights is None else read_start_weights(config.weights, ClassifierHeader)
    assert config.crop_padding is not None
    assert config.horizontal_flip is not None
    check_classes(config.data, dataset)
    training, validation = hold_out(dataset, config.val_fraction, config.seed)
    check_batch_size(config.batch_size, training)
    check_division(config.batch_size, validation, num_parts=config.accumulate)
    header = ClassifierHeader(
        model=config.model,
        data=config.data,
        class_names=dataset.class_names,
        image_shape=(dataset.in_channels, *dataset.image_size),
        preprocess=start.header.preprocess if config.preprocess is None and start else config.preprocess or "",
        is_resized=is_decoded,
        is_exact=config.exact,
        split_seed=None if dataset.division is None else dataset.division.seed,
        split_files=None if dataset.division is None else dataset.division.files,
    )
    if start is not None and config.preprocess is None:
        preprocess = preprocess_of(start, header.image_shape)
    else:
        preprocess = make_preprocess(header.preprocess, dataset.train, dataset.test)
    distort = make_distortion(config, header.in_channels)
    augment = make_augment(config.crop_padding, config.horizontal_flip, dataset.image_size, cutout=config.cutout)
    config, num_updates = config.limit_updates(len(training) // config.batch_size)
    built = build_classifier(config, header, preprocess, start)
    weights = class_weights(config, training, dataset)
    return ClassificationJob(
        config=config,
        names=RunNames(data=dataset.name, model=config.model.rpartition(":")[2]),
        task=ClassificationTask(built.classifier, distort, augment, config, num_updates, class_weights=weights),
        plan=built.plan,
        dataset=dataset,
        training=training,
        validation=validation,
        update=built.update,
        start=built.start,
        sampling_weights=sampling_weights(config, training),
        drift_every=config.drift_every,
    )
