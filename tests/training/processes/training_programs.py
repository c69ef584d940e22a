"""Training in several processes, and the same training in one process without Lightning."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F

from revnet.training import EvaluateResult, LanguageConfig, NiceConfig, TrainConfig, evaluate, predict_images, train
from revnet.training.classification import job as classification
from revnet.training.density import job as density
from revnet.training.density.task import DensityTask
from revnet.training.evaluation.predict_images import ImagePrediction
from revnet.training.language import job as language
from revnet.training.processes.join import gather
from revnet.training.processes.world import launched_world

Config = TrainConfig | NiceConfig | LanguageConfig


class Losses(Callback):
    """Collect the loss of every update, as a mean over the processes."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach().double()
        self.losses.append(float(trainer.strategy.reduce(loss, reduce_op="mean")))


class ReplayedStatistics(Callback):
    """Check that all processes validate with the same running statistics."""

    def on_validation_end(self, trainer, pl_module):
        norms = [m for m in pl_module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        values = gather([norm.running_var.clone() for norm in norms])
        assert all(torch.equal(a, b) for other in values for a, b in zip(values[0], other, strict=True))


def train_all(configs: Mapping[str, Config]) -> dict[str, tuple[Any, list[float]]]:
    """Train by each of the settings, and return the results with the losses of all updates."""
    # Under a launcher, the settings must not ask for another number of processes than it has started.
    devices = None if launched_world() is None else "auto"
    results = {}
    for name, config in configs.items():
        losses = Losses()
        result = train(replace(config, devices=devices), quiet=True, callbacks=[losses, ReplayedStatistics()])
        results[name] = (result, losses.losses)
    return results


class Evaluated(NamedTuple):
    """Evaluation of a classifier, and its predictions for some files."""

    result: EvaluateResult
    predictions: list[ImagePrediction]
    errors: list[str]
    files: list[Path]


def evaluate_and_predict(folder: Path, files: list[Path]) -> Evaluated:
    errors: list[Exception] = []
    result = evaluate(folder, batch_size=37)
    predictions = predict_images(folder, files, batch_size=2, on_error=errors.append)
    return Evaluated(result, predictions, [str(error) for error in errors], files)


def train_and_evaluate(configs: Mapping[Any, Config], files: list[Path]) -> tuple[Any, Evaluated]:
    """Train by each of the settings, and evaluate the first run."""
    results = train_all(configs)
    return results, evaluate_and_predict(next(iter(results.values()))[0].folder, files)


@cache
def losses_of_one_process(config: Config, num_parts: int, strategy: str = "ddp") -> list[float]:
    """Train in one process with each batch in several parts, without Lightning, and return the losses.

    The parts are processed one after another, so that batch norms normalize each part by itself. The layout of the
    weights is the layout that they have with the strategy.
    """
    families = {TrainConfig: classification, NiceConfig: density, LanguageConfig: language}
    job = families[type(config)].new_job(config)
    task = job.task.train()
    if strategy == "fsdp2":
        task.saved_module.model.to(memory_format=torch.contiguous_format)
    loader, _ = job.make_loaders(torch.device("cpu"), num_parts=num_parts)
    optimization = task.configure_optimizers()
    optimizer, scheduler = optimization["optimizer"], optimization["lr_scheduler"]["scheduler"]
    losses: list[float] = []
    for epoch in range(job.config.epochs):
        loader.sampler.set_epoch(epoch)
        batches = iter(loader)
        for _ in range(len(loader) // num_parts):
            if len(losses) == task.num_updates:
                return losses
            parts = [_loss(task, next(batches)) for _ in range(num_parts)]
            optimizer.zero_grad()
            for part in parts:
                (part / num_parts).backward()
            if config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(task.parameters(), config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            losses.append(sum(part.item() for part in parts) / num_parts)
    return losses


def _loss(task: Any, batch: Any) -> torch.Tensor:
    if isinstance(batch, torch.Tensor):
        return task._loss(batch)
    if isinstance(task, DensityTask):
        images, _, keys = batch
        return task.density(images, keys=keys).mean()
    images, labels = task.on_after_batch_transfer(batch, 0)
    return F.cross_entropy(task.classifier.model(images), labels)
