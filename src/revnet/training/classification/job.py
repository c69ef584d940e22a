"""The job of `revnet train`: train a classifier."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from revnet.data import ImageDataset, load_dataset, make_augment, make_loader, make_preprocess
from revnet.data.loading.loader import Loader
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.data.splits.image_split import ImageSplit
from revnet.data.transforms._color_distortion import make_color_distortion
from revnet.data.transforms.augment import NoAugment
from revnet.memory import Plan
from revnet.models import create_model
from revnet.nn import set_tolerance
from revnet.training.classification.config import TrainConfig
from revnet.training.classification.model import Classifier, ClassifierHeader, load_classifier
from revnet.training.classification.result import TrainResult
from revnet.training.classification.task import ClassificationTask
from revnet.training.device import check_device
from revnet.training.evaluation.evaluate import evaluate_on, usual_batch_size
from revnet.training.image_data import absolute_data, check_batch_size, describe_splits
from revnet.training.optimizers import optimizer_factory
from revnet.training.processes.prepare_model import check_devices
from revnet.training.processes.world import check_division, part_of_batch
from revnet.training.run import run_dir
from revnet.training.run.activation_memory import Update, apply_policies, make_plan
from revnet.training.run.checkpoint import is_divided, load_whole_state, read_weights
from revnet.training.run.data_record import DataRecord, record_images
from revnet.training.run.job import AbstractJob, Outcome, RunNames


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
            ("epochs", self.describe_updates("images")),
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
            self.training, batch_size=config.batch_size, shuffle=True, drop_last=True, num_parts=num_parts, keys=True
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
            return load_classifier(path)
        # A whole classifier may not fit on one device.
        load_whole_state(self.task.classifier, read_weights(path).tensors)
        return self.task.classifier


def new_job(config: TrainConfig) -> ClassificationJob:
    """Check the settings of a new run and load its data."""
    with torch.device("meta"):
        model = create_model(config.model)  # reports an unknown name before the data are read, which may take a while
    check_devices(config, model, config.model)
    if config.policy == "store" and not model.is_reversible:
        raise ValueError(f"`policy` (='store') is for reversible models; {config.model} stores its activations anyway.")
    for name in ("exact", "tolerance", "drift_every"):
        if getattr(config, name) and not model.is_reversible:
            raise ValueError(
                f"`{name}` (={getattr(config, name)}) is for reversible models; {config.model} reconstructs nothing."
            )
    dataset = _load(config)
    return _prepare(replace(config, data=absolute_data(config.data)), dataset)


def job_of_run(config: TrainConfig) -> ClassificationJob:
    """Make the job of a run that was stopped, from the settings in its folder."""
    return _prepare(config, _load(config))


def _load(config: TrainConfig) -> ImageDataset:
    return load_dataset(
        config.data, image_size=config.image_size, on_corrupt=config.on_corrupt, crop_area=config.crop_area
    )


def _prepare(config: TrainConfig, dataset: ImageDataset) -> ClassificationJob:
    is_decoded = not isinstance(dataset.train, ImageSplit)
    config = config.resolve(dataset.name, is_decoded=is_decoded)
    check_device(config.device)
    assert config.preprocess is not None
    assert config.crop_padding is not None
    assert config.horizontal_flip is not None
    training, validation = dataset.train, None
    if config.val_fraction > 0:
        training, validation = dataset.holdout(config.val_fraction, config.seed)
    check_batch_size(config.batch_size, training)
    check_division(config.batch_size, validation)
    header = ClassifierHeader(
        model=config.model,
        data=config.data,
        class_names=dataset.class_names,
        image_shape=(dataset.in_channels, *dataset.image_size),
        preprocess=config.preprocess,
        is_resized=is_decoded,
        is_exact=config.exact,
    )
    preprocess = make_preprocess(config.preprocess, dataset.train, dataset.test)
    distort = make_color_distortion() if config.color_distortion else NoAugment()
    augment = make_augment(config.crop_padding, config.horizontal_flip, dataset.image_size, cutout=config.cutout)
    config, num_updates = config.limit_updates(len(training) // config.batch_size)
    update = Update(
        make_model=lambda: Classifier.create(header, preprocess).model,
        make_batch=lambda: torch.empty(part_of_batch(config.batch_size), *header.image_shape),
        loss=partial(_loss, label_smoothing=config.label_smoothing),
        optimizer=optimizer_factory(config),
    )
    plan = make_plan(config, update)
    torch.manual_seed(config.seed)
    classifier = Classifier.create(header, preprocess)
    apply_policies(classifier.model, config, plan)
    if config.tolerance is not None:
        set_tolerance(classifier.model, config.tolerance)
    return ClassificationJob(
        config=config,
        names=RunNames(data=dataset.name, model=config.model),
        task=ClassificationTask(classifier, distort, augment, config, num_updates),
        plan=plan,
        dataset=dataset,
        training=training,
        validation=validation,
        update=update,
        drift_every=config.drift_every,
    )


def _loss(logits: Tensor, **options: Any) -> Tensor:
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return F.cross_entropy(logits, labels, **options)
