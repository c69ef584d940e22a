"""Inputs of `revnet doctor`: a model from a checkpoint, the registry or the user, with a batch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revnet._paths import expand_user
from revnet.cli._build import cpu_or_cuda
from revnet.cli._errors import UsageError
from revnet.cli._model import build_model
from revnet.cli._step_flags import StepFlags
from revnet.data import ImageDataset, Preprocess, load_dataset, make_loader, make_preprocess
from revnet.data.splits.image_split import ImageSplit
from revnet.models import create_model, list_models, published_image_size
from revnet.models.pretrained.hub_files import is_hub_name
from revnet.models.pretrained.shipped import find_pretrained
from revnet.training import load_classifier


@dataclass(frozen=True, eq=False)
class DoctorInputs:
    """A model in training mode, with a batch of its inputs."""

    model: nn.Module
    inputs: Tensor
    loss: Callable[[Any], Tensor] | None
    """Cross-entropy if there are labels; None for a weighted sum of the outputs."""
    description: str
    """Description in one line."""


def is_checkpoint(name: str) -> bool:
    """Return whether `name` is a file, a run or a name on the hub rather than a model."""
    if is_hub_name(name) or find_pretrained(name) is not None:
        return True
    if ":" in name or name in list_models():
        return False
    path = expand_user(name)
    return len(path.parts) > 1 or path.suffix in (".safetensors", ".ckpt") or path.exists()


def build_doctor_inputs(flags: StepFlags, data: str | None) -> DoctorInputs:
    """Build a model, with random weights or from a checkpoint, and a batch of noise or of real images.

    Raises:
        CheckpointError: The checkpoint is missing or truncated, or does not hold a classifier.
        DataError: The data set is missing or corrupt.
        ValueError: The model, data set or device does not exist, or the data do not fit the model.
    """
    device = cpu_or_cuda(flags.device)
    torch.manual_seed(0)  # the same weights and noise in every run
    if is_checkpoint(flags.model):
        doctor_inputs = _from_checkpoint(flags, data)
    elif data is None:
        doctor_inputs = _on_noise(flags)
    else:
        doctor_inputs = _on_images(flags, data)
    inputs = doctor_inputs.inputs.to(device)
    if inputs.dim() == 4:  # images are in channels-last order, as in `revnet train`
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    shape = "x".join(map(str, inputs.shape[1:])) or "one number"
    step = f"a training step on {len(inputs):,} {doctor_inputs.description} of {shape}"
    description = f"{flags.model}: {step}, {flags.precision}, {device}"
    return replace(doctor_inputs, model=doctor_inputs.model.to(device).train(), inputs=inputs, description=description)


def _from_checkpoint(flags: StepFlags, data: str | None) -> DoctorInputs:
    if flags.image is not None:
        raise UsageError(
            "`--image` is for models by name; a checkpoint keeps the image size of its training data. Leave it out."
        )
    classifier = load_classifier(expand_user(flags.model))
    header = classifier.header
    if data is None:
        return DoctorInputs(classifier.model, torch.randn(flags.batch, *header.image_shape), None, "random inputs")
    size = header.image_shape[1] if header.is_resized else None
    dataset = load_dataset(data, image_size=size, seed=header.split_seed, on_corrupt="skip")
    if (dataset.in_channels, *dataset.image_size) != header.image_shape:
        raise UsageError(
            f"`--data` (={data}) has images of {dataset.in_channels}x{_join(dataset.image_size)}, but `{flags.model}` "
            f"was trained on {_join(header.image_shape)}; pass the data that it was trained on."
        )
    images, labels = _batch(dataset, flags.batch)
    loss = _cross_entropy(labels) if dataset.num_classes <= header.num_classes else None
    return DoctorInputs(classifier.model, classifier.preprocess(images), loss, f"images of {dataset.name}")


def _on_noise(flags: StepFlags) -> DoctorInputs:
    model = build_model(flags.model, is_real=True)
    if flags.input_shapes is None:
        size = flags.image or (224 if flags.is_own else published_image_size(flags.model))
        shape: tuple[int, ...] = (3, size, size)
    else:
        (shape,) = flags.input_shapes
    if flags.input_dtype == "int64":
        return DoctorInputs(
            model, torch.zeros(flags.batch, *shape, dtype=torch.int64), None, "inputs that are all zero,"
        )
    return DoctorInputs(model, torch.randn(flags.batch, *shape), None, "random inputs")


def _on_images(flags: StepFlags, data: str) -> DoctorInputs:
    if flags.input_shape is not None or flags.input_dtype != "float32":
        raise UsageError("`--data` sets the shape and type of an input; leave out `--input-shape` and `--input-dtype`.")
    if not flags.is_own:
        build_model(flags.model, is_real=False)  # rejects an unknown name before the data are read
    dataset = load_dataset(data, image_size=flags.image, on_corrupt="skip")
    images, labels = _batch(dataset, flags.batch)
    images = _preprocess(dataset)(images)
    loss = _cross_entropy(labels)
    if flags.is_own:
        # The outputs may not be logits of these classes, so the cross-entropy is not computed.
        return DoctorInputs(build_model(flags.model, is_real=True), images, None, f"images of {dataset.name}")
    model = create_model(flags.model, num_classes=dataset.num_classes, in_channels=dataset.in_channels)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # PyTorch's stubs lack it
    return DoctorInputs(model, images, loss, f"images of {dataset.name}")


def _preprocess(dataset: ImageDataset) -> Preprocess:
    kind = "standardize" if isinstance(dataset.train, ImageSplit) else "imagenet"
    return make_preprocess(kind, dataset.train, dataset.test)


def _batch(dataset: ImageDataset, size: int) -> tuple[Tensor, Tensor]:
    """Return training images and labels, drawn at random."""
    if size > len(dataset.train):
        raise UsageError(f"`--batch` (={size}) must not exceed the {len(dataset.train)} training images.")
    return next(iter(make_loader(dataset.train, batch_size=size, shuffle=True, seed=0)))


def _cross_entropy(labels: Tensor) -> Callable[[Any], Tensor]:
    return partial(_loss, labels=labels)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels.to(logits.device))


def _join(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
