"""What `revnet doctor` looks at: a model with a batch, out of a checkpoint, of the registry or of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revnet.cli._build import find_cpu_or_cuda
from revnet.cli._model import build_model
from revnet.cli._step import StepFlags
from revnet.data import ImageDataset, ImageSplit, Preprocess, load_dataset, make_loader, make_preprocess
from revnet.models import create_model, list_models, published_image_size
from revnet.training import load_classifier


@dataclass(frozen=True, eq=False)
class Specimen:
    """A model in training mode, with a batch of what it takes."""

    model: nn.Module
    inputs: Tensor
    loss: Callable[[Any], Tensor] | None
    """Cross-entropy, where there are labels; None for a weighted sum of the outputs."""
    description: str
    """What it is, in one line."""


def is_checkpoint(name: str) -> bool:
    """Whether the command line names a file or a run, rather than a model."""
    if ":" in name or name in list_models():
        return False
    path = Path(name).expanduser()
    return len(path.parts) > 1 or path.suffix in (".safetensors", ".ckpt") or path.exists()


def build_specimen(flags: StepFlags, data: str | None) -> Specimen:
    """Build the model with random weights, or those of a checkpoint, and a batch of noise, or of real images.

    Raises:
        CheckpointError: The checkpoint is missing, truncated, or of no classifier.
        DataError: The data set is missing or corrupt.
        ValueError: There is no such model, data set or device, or one does not fit the other.
    """
    device = find_cpu_or_cuda(flags.device)
    torch.manual_seed(0)  # weights and noise of the same model are the same again
    if is_checkpoint(flags.model):
        specimen = _of_checkpoint(flags, data)
    elif data is None:
        specimen = _on_noise(flags)
    else:
        specimen = _on_images(flags, data)
    # As `revnet train` has them.
    inputs = specimen.inputs.to(device)
    if inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    shape = "x".join(map(str, inputs.shape[1:])) or "one number"
    step = f"a training step on {len(inputs)} {specimen.description} of {shape}"
    description = f"{flags.model}: {step}, {flags.precision}, {device}"
    return replace(specimen, model=specimen.model.to(device).train(), inputs=inputs, description=description)


def _of_checkpoint(flags: StepFlags, data: str | None) -> Specimen:
    if flags.image is not None:
        raise ValueError("`--image` is for models by name; a checkpoint has the size of the images it was trained on.")
    classifier = load_classifier(Path(flags.model).expanduser())
    header = classifier.header
    if data is None:
        return Specimen(classifier.model, torch.randn(flags.batch, *header.image_shape), None, "random inputs")
    dataset = load_dataset(data, image_size=header.image_shape[1] if header.is_resized else None)
    if (dataset.in_channels, *dataset.image_size) != header.image_shape:
        raise ValueError(
            f"`--data` (={data}) has images of {dataset.in_channels}x{_join(dataset.image_size)}, but `{flags.model}` "
            f"was trained on {_join(header.image_shape)}; pass the data that it was trained on."
        )
    images, labels = _batch(dataset, flags.batch)
    loss = _cross_entropy(labels) if dataset.num_classes <= header.num_classes else None
    return Specimen(classifier.model, classifier.preprocess(images), loss, f"images of {dataset.name}")


def _on_noise(flags: StepFlags) -> Specimen:
    model = build_model(flags.model, is_real=True)
    shape = flags.input_shape
    if shape is None:
        size = flags.image or (224 if flags.is_own else published_image_size(flags.model))
        shape = (3, size, size)
    if flags.input_dtype == "int64":
        return Specimen(model, torch.zeros(flags.batch, *shape, dtype=torch.int64), None, "inputs that are all zero,")
    return Specimen(model, torch.randn(flags.batch, *shape), None, "random inputs")


def _on_images(flags: StepFlags, data: str) -> Specimen:
    if flags.input_shape is not None or flags.input_dtype != "float32":
        raise ValueError("`--data` says what an input is; leave `--input-shape` and `--input-dtype` out.")
    if not flags.is_own:
        build_model(flags.model, is_real=False)  # an unknown name is told before the data are read
    dataset = load_dataset(data, image_size=flags.image)
    images, labels = _batch(dataset, flags.batch)
    images = _preprocess(dataset)(images)
    loss = _cross_entropy(labels)
    if flags.is_own:
        # Nobody knows whether its outputs are logits of these classes.
        return Specimen(build_model(flags.model, is_real=True), images, None, f"images of {dataset.name}")
    model = create_model(flags.model, num_classes=dataset.num_classes, in_channels=dataset.in_channels)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # PyTorch's stubs lack it
    return Specimen(model, images, loss, f"images of {dataset.name}")


def _preprocess(dataset: ImageDataset) -> Preprocess:
    kind = "standardize" if isinstance(dataset.train, ImageSplit) else "imagenet"
    return make_preprocess(kind, dataset.train, dataset.test)


def _batch(dataset: ImageDataset, size: int) -> tuple[Tensor, Tensor]:
    """Training images, drawn at random."""
    if size > len(dataset.train):
        raise ValueError(f"`--batch` (={size}) must not exceed the {len(dataset.train)} images that train.")
    return next(iter(make_loader(dataset.train, batch_size=size, shuffle=True, seed=0)))


def _cross_entropy(labels: Tensor) -> Callable[[Any], Tensor]:
    return partial(_loss, labels=labels)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels.to(logits.device))


def _join(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
