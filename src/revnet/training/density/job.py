"""The job of `revnet train nice`: fit a density to images."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from revnet._units import counted, nearest_multiples
from revnet.data import ImageDataset, make_loader
from revnet.data.loading.loader import Loader
from revnet.data.splits.image_split import ImageSplit
from revnet.data.transforms.dequantize import count_levels
from revnet.memory import Plan
from revnet.models.glow import MOST_SCALES
from revnet.training.density.config import NiceConfig
from revnet.training.density.images import load_images
from revnet.training.density.model import (
    EVALUATION_BATCH_SIZE,
    DensityHeader,
    ImageDensity,
    load_density,
    mean_bits_per_dim,
)
from revnet.training.density.result import DensityResult
from revnet.training.density.task import DensityTask
from revnet.training.device import find_device
from revnet.training.image_data import absolute_data, check_batch_size, describe_splits
from revnet.training.optimizers import make_optimizer
from revnet.training.processes.prepare_model import check_devices
from revnet.training.processes.world import check_division, part_of_batch
from revnet.training.run import run_dir
from revnet.training.run.activation_memory import Update, apply_policies, make_plan
from revnet.training.run.data_record import DataRecord, record_images
from revnet.training.run.job import AbstractJob, Outcome, RunNames
from revnet.training.run.network import prepare_network
from revnet.training.starting import absolute_weights, describe_start, load_start_weights, read_start_weights

_NUM_ADAPTED = 1000  # images that the initial scale is computed from


@dataclass(frozen=True, eq=False, kw_only=True)
class DensityJob(AbstractJob[DensityResult]):
    """Job of a run that fits a density to images."""

    config: NiceConfig
    names: RunNames
    task: DensityTask
    plan: Plan | None
    dataset: ImageDataset
    training: ImageSplit
    validation: ImageSplit | None
    test: ImageSplit
    update: Update
    start: str | None

    def heading(self) -> list[tuple[str, str]]:
        """Return the lines printed before training: model, data, epochs."""
        density, config = self.task.density, self.config
        num_parameters = sum(parameter.numel() for parameter in density.model.parameters())
        shape = "x".join(map(str, density.header.image_shape))
        counts = describe_splits(self.training, self.validation, self.test)
        levels = f"{density.header.num_levels} levels"
        return [
            ("model", f"{_describe_model(config)}, {config.prior} prior, {num_parameters:,} parameters"),
            ("data", f"{self.dataset.name}, images of {shape} in {levels}: {counts}"),
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
        loader = partial(
            make_loader,
            seed=config.seed,
            keys=True,
            pin_memory=device.type == "cuda",
            rank=rank,
            num_processes=num_processes,
        )
        training = loader(
            self.training, batch_size=config.batch_size, shuffle=True, drop_last=True, num_parts=num_parts
        )
        if self.validation is None:
            return training, None
        return training, loader(self.validation, batch_size=num_processes * EVALUATION_BATCH_SIZE, shuffle=False)

    def finish(self, folder: Path, outcome: Outcome) -> DensityResult:
        """Evaluate the last weights, and the best if there was a validation, on the test set."""
        best = None if outcome.best_score is None else load_density(folder / run_dir.BEST_WEIGHTS)
        bits = partial(mean_bits_per_dim, images=self.test.images, device=outcome.device, seed=self.config.seed)
        return DensityResult(
            model=self.config.model,
            data=self.dataset.name,
            num_test_images=len(self.test),
            test_bits_per_dim=bits(self.task.density),
            best_test_bits_per_dim=None if best is None else bits(best),
            best_val_bits_per_dim=outcome.best_score,
            **outcome.figures.as_arguments(),
        )


def new_job(config: NiceConfig) -> DensityJob:
    """Check the settings of a new run and load its data."""
    dataset = load_images(config.data, image_size=config.image_size, on_corrupt=config.on_corrupt)
    config = replace(config, data=absolute_data(config.data), weights=absolute_weights(config.weights))
    return _prepare(config, dataset)


def job_of_run(config: NiceConfig) -> DensityJob:
    """Make the job of a run that was stopped, from the settings in its folder."""
    return _prepare(config, load_images(config.data, image_size=config.image_size, on_corrupt=config.on_corrupt))


def _prepare(config: NiceConfig, dataset: ImageDataset) -> DensityJob:
    config = config.resolve(dataset.name)
    find_device(config.device)
    whole, test = dataset.train, dataset.test
    assert isinstance(whole, ImageSplit)
    assert isinstance(test, ImageSplit)
    training, validation = whole, None
    if config.val_fraction > 0:
        dataset.check_holdout("val_fraction", config.val_fraction)
        training, validation = whole.holdout(config.val_fraction, config.seed)
    check_batch_size(config.batch_size, training)
    _check_scales(config, whole.image_shape)
    check_division(config.batch_size, validation, num_parts=config.accumulate)
    header = DensityHeader(
        model=config.model,
        data=config.data,
        image_shape=whole.image_shape,
        num_levels=count_levels(whole.images),
        options=config.model_options(),
        is_resized=config.image_size is not None,
    )
    config, num_updates = config.limit_updates(len(training) // config.batch_size)
    update = Update(
        make_model=lambda: prepare_network(ImageDensity.create(header).model, config),
        make_batch=lambda: torch.empty(part_of_batch(config.batch_size, config.accumulate), *header.image_shape),
        loss=_loss,
        optimizer=partial(make_optimizer, config),
    )
    plan = make_plan(config, update)
    torch.manual_seed(config.seed)
    density = ImageDensity.create(header)
    check_devices(config, density.model, config.model)
    start = None
    if config.weights is None:
        density.adapt_scale(training.images[:_NUM_ADAPTED], torch.Generator().manual_seed(config.seed))
    else:
        weights = read_start_weights(config.weights, DensityHeader)
        load_start_weights(density.model, weights.network, weights.path)
        start = describe_start(weights.path, ())
    prepare_network(density.model, config)
    apply_policies(density.model, config, plan)
    return DensityJob(
        config=config,
        names=RunNames(data=dataset.name, model=config.model, loss="bits per dimension"),
        task=DensityTask(density, config, num_updates),
        plan=plan,
        dataset=dataset,
        training=training,
        validation=validation,
        test=test,
        update=update,
        start=start,
    )


def _check_scales(config: NiceConfig, image_shape: tuple[int, int, int]) -> None:
    """Raise unless each scale of the model can halve the sides of the images."""
    _, height, width = image_shape
    common = math.gcd(height, width)
    most_scales = (common & -common).bit_length() - 1
    if config.model == "nice" or config.num_scales <= most_scales:
        return
    reason = f"since each scale of {config.model} halves the sides of the images, which have {height} x {width} pixels"
    if config.image_size is not None and config.num_scales <= MOST_SCALES:
        factor = 2**config.num_scales
        raise ValueError(
            f"`image_size` (={config.image_size}) must be a multiple of {factor}, since each scale of "
            f"{config.model} halves it; pass {nearest_multiples(height, factor)}, or fewer `num_scales` than "
            f"{config.num_scales}."
        )
    if most_scales == 0:
        raise ValueError(f"`model` (={config.model}) needs sides that are even, {reason}; pass nice, or other images.")
    raise ValueError(f"`num_scales` (={config.num_scales}) must be at most {most_scales}, {reason}.")


def _describe_model(config: NiceConfig) -> str:
    if config.model == "nice":
        return f"nice, {counted(config.num_couplings, 'coupling')}"
    couplings = counted(config.num_couplings, "coupling")
    return f"{config.model}, {counted(config.num_scales, 'scale')} of {couplings}"


def _loss(output: tuple[Tensor, Tensor]) -> Tensor:
    """Return a loss that allocates what the likelihood allocates."""
    z, log_det = output
    return (z.abs().sum(1) - log_det).mean()
