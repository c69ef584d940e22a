"""Fitting NICE to images: what `revnet train nice` does."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from revnet.data import ImageDataset, ImageSplit, Loader, count_levels, load_dataset, make_loader
from revnet.memory import Plan
from revnet.training import _run_dir
from revnet.training._job import AbstractJob, Names, Outcome
from revnet.training._memory import PeakBytes, Update, apply_policies, count_peak_bytes, make_plan
from revnet.training._trainer import check_device
from revnet.training.classification import absolute_data
from revnet.training.density import DensityHeader, ImageDensity, load_density
from revnet.training.density_result import DensityResult
from revnet.training.density_task import DensityTask
from revnet.training.nice_config import NiceConfig
from revnet.training.optimizers import adamw_factory

_EVALUATION_BATCH_SIZE = 500
_NUM_ADAPTED = 1000  # images from which the first scale is taken


@dataclass(frozen=True, eq=False, kw_only=True)
class DensityJob(AbstractJob[DensityResult]):
    """A run that fits NICE to images."""

    config: NiceConfig
    names: Names
    task: DensityTask
    num_epochs: int
    batch_size: int
    max_grad_norm: float | None
    plan: Plan | None
    dataset: ImageDataset
    training: ImageSplit
    validation: ImageSplit | None
    test: ImageSplit
    update: Update

    def heading(self) -> list[tuple[str, str]]:
        """Model, data and epochs."""
        density, config = self.task.nice, self.config
        num_parameters = sum(parameter.numel() for parameter in density.model.parameters())
        shape = "x".join(map(str, density.header.image_shape))
        parts = {"train": self.training, "validate": self.validation, "test": self.test}
        counts = ", ".join(f"{len(part):,} {verb}" for verb, part in parts.items() if part is not None)
        levels = f"{density.header.num_levels} levels"
        return [
            ("model", f"nice, {config.num_couplings} couplings, {config.prior} prior, {num_parameters:,} parameters"),
            ("data", f"{self.dataset.name}, images of {shape} in {levels}: {counts}"),
            ("epochs", f"{self.num_epochs}, {self.task.num_updates:,} updates of {self.batch_size} images"),
        ]

    def make_loaders(self, device: torch.device) -> tuple[Loader, Loader | None]:
        """Images that train, all updates of the same size so that they weigh the same, and those that validate."""
        loader = partial(make_loader, seed=self.config.seed, pin_memory=device.type == "cuda")
        training = loader(self.training, batch_size=self.batch_size, shuffle=True, drop_last=True)
        if self.validation is None:
            return training, None
        return training, loader(self.validation, batch_size=_EVALUATION_BATCH_SIZE, shuffle=False)

    def count_peak_bytes(self) -> PeakBytes:
        """Activations of an update, and with all of them stored if they are not."""
        return count_peak_bytes(self.task.nice.model, self.config, self.update)

    def finish(self, folder: Path, outcome: Outcome) -> DensityResult:
        """Read the test set, with the last weights and with those that validation chose."""
        best = None if outcome.best_score is None else load_density(folder / _run_dir.BEST_WEIGHTS)
        bits = partial(mean_bits_per_dim, images=self.test.images, device=outcome.device, seed=self.config.seed)
        return DensityResult(
            data=self.dataset.name,
            num_test_images=len(self.test),
            test_bits_per_dim=bits(self.task.nice),
            best_test_bits_per_dim=None if best is None else bits(best),
            best_val_bits_per_dim=outcome.best_score,
            **outcome.common,
        )


@torch.no_grad()
def mean_bits_per_dim(density: ImageDensity, images: Tensor, device: torch.device, seed: int = 0) -> float:
    """Bits per dimension of images, uint8, for the noise of one seed; `density` is moved to `device`."""
    density.to(device).eval()
    noise = torch.Generator().manual_seed(seed)
    batches = images.split(_EVALUATION_BATCH_SIZE)
    return sum(float(density(batch.to(device), noise).double().sum()) for batch in batches) / len(images)


def new_job(config: NiceConfig) -> DensityJob:
    """Check the settings of a new run, and load its data."""
    dataset = load_dataset(config.data, on_corrupt=config.on_corrupt)
    return _prepare(replace(config, data=absolute_data(config.data)), dataset)


def job_of_run(config: NiceConfig) -> DensityJob:
    """Make the job of a run that was stopped, from its own settings."""
    return _prepare(config, load_dataset(config.data, on_corrupt=config.on_corrupt))


def _prepare(config: NiceConfig, dataset: ImageDataset) -> DensityJob:
    config = config.resolve(dataset.name)
    check_device(config.device)
    whole, test = dataset.train, dataset.test
    if not isinstance(whole, ImageSplit) or not isinstance(test, ImageSplit):
        raise ValueError(
            f"`data` (='{config.data}') has images in files, and NICE takes images of one size that are held in "
            "memory; pass digits, cifar10, cifar100, or parquet files with images of one size."
        )
    training, validation = whole, None
    if config.val_fraction > 0:
        training, validation = whole.holdout(config.val_fraction, config.seed)
    if config.batch_size > len(training):
        raise ValueError(
            f"`batch_size` (={config.batch_size}) must not exceed the {len(training)} images that train; "
            "pass a smaller one."
        )
    header = DensityHeader(
        data=config.data,
        image_shape=whole.image_shape,
        num_levels=count_levels(whole.images),
        options={
            "num_couplings": config.num_couplings,
            "hidden_dim": config.hidden_dim,
            "num_hidden": config.num_hidden,
            "prior": config.prior,
        },
    )
    updates_per_epoch = len(training) // config.batch_size
    num_updates = min(config.epochs * updates_per_epoch, config.max_updates or sys.maxsize)
    config = replace(config, epochs=-(-num_updates // updates_per_epoch))
    update = Update(
        make_model=lambda: ImageDensity.create(header).model,
        make_batch=lambda: torch.empty(config.batch_size, *header.image_shape),
        loss=_loss,
        optimizer=adamw_factory(config),
    )
    plan = make_plan(config, update)
    torch.manual_seed(config.seed)
    density = ImageDensity.create(header)
    density.adapt_scale(training.images[:_NUM_ADAPTED], torch.Generator().manual_seed(config.seed))
    apply_policies(density.model, config, plan)
    return DensityJob(
        config=config,
        names=Names(command="revnet train nice", data=dataset.name, model="nice", loss="bits per dimension"),
        task=DensityTask(density, config, num_updates),
        num_epochs=config.epochs,
        batch_size=config.batch_size,
        max_grad_norm=config.max_grad_norm,
        plan=plan,
        dataset=dataset,
        training=training,
        validation=validation,
        test=test,
        update=update,
    )


def _loss(output: tuple[Tensor, Tensor]) -> Tensor:
    """As large as the likelihood, in tensors and their sizes."""
    z, log_det = output
    return (z.abs().sum(1) - log_det).mean()
