"""Small classifiers and data sets, with known or arbitrary answers."""

import csv
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from revnet.data import ImageDataset, Preprocess
from revnet.data.splits.image_split import ImageSplit
from revnet.training import (
    TrainingInterrupted,
    load_classifier,
    load_density,
    load_language_model,
    resume,
    train,
)
from revnet.training.classification.model import Classifier, ClassifierHeader
from revnet.training.run.checkpoint import read_weights, save_weights
from revnet.training.run.checkpoint_folder import CheckpointFolder
from revnet.training.run.save_checkpoints import SaveCheckpoints
from revnet.training.settings.run_config import AbstractRunConfig
from tests.data.samples import encode, random_images
from tests.training.own_code import tiny_revnet


def make_header(class_names=("cat", "dog", "frog"), image_shape=(3, 8, 8), **options) -> ClassifierHeader:
    options = {"model": "resnet32", "data": "pets", "preprocess": "standardize"} | options
    return ClassifierHeader(class_names=tuple(class_names), image_shape=image_shape, **options)


class SayPixels(nn.Module):
    """A classifier whose logits are the pixels of the first row."""

    def __init__(self, header: ClassifierHeader) -> None:
        super().__init__()
        self.header = header

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, : self.header.num_classes].float()


def make_dataset(answers: Tensor, labels: Tensor, class_names, name: str = "pets") -> ImageDataset:
    """Return images for which `SayPixels` returns `answers`, (N, K) from 0 to 255, as logits."""
    images = torch.zeros(len(labels), 1, 1, answers.shape[1], dtype=torch.uint8)
    images[:, 0, 0] = answers.to(torch.uint8)
    split = ImageSplit(images, labels)
    return ImageDataset(name=name, train=split, test=split, class_names=tuple(class_names))


def save_checkpoint(path: Path, header: ClassifierHeader) -> Path:
    """Write a file of random weights."""
    channels = header.in_channels
    preprocess = Preprocess(torch.full((channels, 1, 1), 128.0), torch.full((channels, 1, 1), 64.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(Classifier.create(header, preprocess), path)
    return path


def write_images(folder: Path, num_images: int, height: int = 24, width: int = 32, seed: int = 0) -> list[Path]:
    """Write PNG files of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{seed}_{number}.png" for number in range(num_images)]
    for file, image in zip(files, random_images(num_images, 3, height, width, seed), strict=True):
        file.write_bytes(encode(image))
    return files


def write_image_folder(folder: Path, class_names=("cat", "dog", "frog"), num_images: int = 2) -> Path:
    """Write a data set of PNG files in the layout of ImageNet."""
    for part, seed in (("train", 0), ("val", 100)):
        for number, name in enumerate(class_names):
            write_images(folder / part / name, num_images, seed=seed + number)
    return folder


def write_text(folder: Path, num_sentences: int = 40) -> str:
    """Write a text for a language model, and return the name of its file."""
    file = folder / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * num_sentences)
    return str(file)


def read_log(folder: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    """Read a log of a run, by epoch or by update."""
    with (folder / name).open() as file:
        return list(csv.DictReader(file))


def assert_same_logs(first: Path, second: Path) -> None:
    """The logs of two runs are equal, apart from times and memory."""
    measured = dict.fromkeys(("step_seconds", "samples_per_second", "epoch_seconds", "peak_bytes"), "")
    logs = [[row | measured for row in read_log(folder)] for folder in (first, second)]
    assert logs[0] == logs[1]


def interrupt() -> None:
    raise KeyboardInterrupt


def stop_after_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int, stop: Callable[[], object] = interrupt) -> None:
    """Make a run call `stop` once the files of `epoch` have been written."""
    save = SaveCheckpoints.on_train_epoch_end

    def save_and_stop(self, trainer, pl_module):
        save(self, trainer, pl_module)
        if trainer.current_epoch + 1 == epoch:
            stop()

    monkeypatch.setattr(SaveCheckpoints, "on_train_epoch_end", save_and_stop)


def newest_checkpoint(folder: Path) -> Path:
    """Return the newest checkpoint of a run."""
    checkpoint = CheckpointFolder(folder / "checkpoints").newest()
    assert checkpoint is not None
    return checkpoint.path


TINY = "tests.training.own_code:tiny_revnet"
"""A classifier for tests of what does not depend on the model."""

SMALL_LANGUAGE_RUN = {
    "length": 16,
    "depth": 2,
    "dim": 16,
    "num_heads": 2,
    "batch_size": 8,
    "epochs": 2,
    "updates_per_epoch": 5,
    "lr": 1e-2,
    "num_threads": 1,
}
"""Settings of a language model that trains in a moment."""

RUN_FILES = [
    "best.safetensors",
    "checkpoints",
    "config.yaml",
    "data.json",
    "last.safetensors",
    "learning_curve.png",
    "metrics.csv",
    "summary.json",
    "updates.csv",
]
"""Files of a finished run without a plan."""


def train_and_resume(
    config: AbstractRunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, stop_after: int
) -> tuple[Any, Any]:
    """Return the results of two runs: one straight through, and one stopped after an epoch and resumed."""
    straight = train(replace(config, out_dir=str(tmp_path / "straight")), quiet=True)
    with monkeypatch.context() as patch:
        stop_after_epoch(patch, stop_after)
        with pytest.raises(
            TrainingInterrupted, match=r"`revnet train --resume .*stopped` continues after update \d+\."
        ):
            train(replace(config, out_dir=str(tmp_path / "stopped")), quiet=True)
    torch.rand(1000)  # a new process may draw numbers before it resumes
    return straight, resume(tmp_path / "stopped", quiet=True)


def train_with_copies(
    config: AbstractRunConfig, tmp_path: Path, callbacks: Sequence[Callback] = ()
) -> tuple[Any, list[Path]]:
    """Return the result of a run, and copies of its folder as it was after each checkpoint."""
    copies: list[Path] = []
    save = SaveCheckpoints._save

    def save_and_copy(self: SaveCheckpoints, trainer: Any) -> None:
        save(self, trainer)
        copies.append(tmp_path / f"copy_{len(copies)}")
        if trainer.is_global_zero:
            shutil.copytree(self._folder.path.parent, copies[-1])
        trainer.strategy.barrier()

    with mock.patch.object(SaveCheckpoints, "_save", save_and_copy):
        config = replace(config, out_dir=str(tmp_path / "straight"), save_every=1)
        result = train(config, quiet=True, callbacks=callbacks)
    return result, copies


def _load_classifier(path: Path) -> nn.Module:
    is_tiny = read_weights(path).metadata["model"] == TINY
    return load_classifier(path, model=tiny_revnet(10, 1) if is_tiny else None)


def load_weights(path: Path) -> nn.Module:
    """Rebuild a module of any kind."""
    kind = read_weights(path).metadata.get("kind")
    loaders: dict[str | None, Any] = {None: _load_classifier, "nice": load_density, "lm": load_language_model}
    return loaders[kind](path)


def assert_same_run(straight: Any, resumed: Any, load: Callable[[Path], nn.Module] = load_weights) -> None:
    """The weights of both runs are equal bit for bit, and so are the logs, apart from times and memory.

    `load` rebuilds a module from its file; a run with a network of one's own needs another one.
    """
    for weights in ("last.safetensors", "best.safetensors"):
        expected, actual = (load(result.folder / weights).state_dict() for result in (straight, resumed))
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert_same_logs(straight.folder, resumed.folder)
