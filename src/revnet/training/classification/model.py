"""A classifier: a model with the preprocessing that it was trained with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from revnet._checks import check_module, check_path
from revnet._outside_text import shorten
from revnet.coupling import FixedPoint
from revnet.data import Preprocess
from revnet.errors import CheckpointError
from revnet.models import create_model
from revnet.nn import set_coupling
from revnet.training.run.checkpoint import find_weights, load_module, read_weights
from revnet.training.saved_module import AbstractHeader, SavedModule, check_fit

NO_PREPROCESS = "none"
"""Kind of preprocessing of images that are floating point already."""


@dataclass(frozen=True, kw_only=True)
class ClassifierHeader(AbstractHeader):
    """Everything that it takes to rebuild a classifier, except its tensors."""

    kind: ClassVar[str] = "classifier"
    as_text: ClassVar[frozenset[str]] = frozenset({"model", "data", "preprocess"})

    model: str
    """Name of the model."""

    data: str
    """Data set, as in the settings."""

    class_names: tuple[str, ...]
    """Names of the classes, in the order of the logits."""

    image_shape: tuple[int, int, int]
    """Shape of the training images, (C, H, W)."""

    preprocess: str
    """Kind of preprocessing."""

    is_resized: bool = False
    """Whether images were resized to `image_shape`; otherwise the data have that shape."""

    is_exact: bool = False
    """Whether the streams of reversible blocks lie on a fixed-point grid, with rounded residuals."""

    split_seed: int | None = None
    """Seed that chose the test images of a plain folder of classes; None if the data came with a test set."""

    split_files: str | None = None
    """Fingerprint of the names of the files in that folder."""

    def __post_init__(self) -> None:
        if min(self.image_shape) < 1 or not self.class_names:
            raise ValueError("`image_shape` must be positive, and `class_names` must not be empty.")

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        """Number of image channels."""
        return self.image_shape[0]


class Classifier(SavedModule):
    """The `model` after the `preprocess` that it was trained with: from bytes to logits.

    Shape:
        images: (B, C, H, W), uint8, or floating point where there is nothing to preprocess. Output: (B, num_classes).
    """

    header_type: ClassVar[type[AbstractHeader]] = ClassifierHeader
    header: ClassifierHeader

    def __init__(self, model: nn.Module, preprocess: nn.Module, header: ClassifierHeader) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        self.header = header

    @classmethod
    def create(
        cls, header: ClassifierHeader, preprocess: nn.Module, *, network: nn.Module | None = None, **options: Any
    ) -> Self:
        """Make a classifier with random weights.

        Args:
            header: Header, which names the model.
            preprocess: Preprocessing.
            network: The user's own model; None builds the model of that name.
            options: Options of the model, such as `policy=Store()`.
        """
        model = network
        if model is None:
            model = create_model(
                header.model, num_classes=header.num_classes, in_channels=header.in_channels, **options
            )
            # Weights in this layout carry all activations into it, for which convolutions of few channels are faster.
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # PyTorch's stubs lack it
        if header.is_exact:
            set_coupling(model, FixedPoint())
        return cls(model, preprocess, header)

    @classmethod
    def build(cls, header: ClassifierHeader, tensors: Mapping[str, Tensor]) -> Self:
        """Build a classifier with the preprocessing in `tensors`.

        Raises:
            ValueError: The model is unknown, or the tensors of the preprocessing are missing.
        """
        if ":" in header.model:
            raise ValueError(
                f"its model {shorten(header.model)} is your own code, which a file of weights must not run; "
                "build the model and pass it to `load_classifier(path, model=...)`."
            )
        return cls.create(header, _preprocess_of(header, tensors))

    def forward(self, images: Tensor) -> Tensor:
        """Classify raw images."""
        return self.model(self.preprocess(images))


def _preprocess_of(header: ClassifierHeader, tensors: Mapping[str, Tensor]) -> nn.Module:
    buffers = {name.removeprefix("preprocess."): x for name, x in tensors.items() if name.startswith("preprocess.")}
    if header.preprocess == NO_PREPROCESS and not buffers:
        return nn.Identity()
    try:
        return Preprocess(**buffers)
    except TypeError as error:
        raise ValueError("it lacks the tensors of its preprocessing, or has others.") from error


def load_classifier(path: str | Path, *, model: nn.Module | None = None) -> Classifier:
    """Rebuild the classifier of a run of `revnet train`, on the CPU and in evaluation mode.

    Args:
        path: A `.safetensors` file, a `.ckpt` file, or the folder of a run, whose last weights are loaded.
        model: The network, for a run with a model of your own; its weights are replaced.

    Raises:
        CheckpointError: The file does not exist, is truncated, was not written by revnet, holds another kind of model,
            or its tensors do not fit the model that it names.
    """
    if model is None:
        return load_module(Classifier, path)
    check_path("path", path, hint="a file of weights, or the folder of a run")
    check_module("model", model, hint="pass the network of the run")
    path = find_weights(Path(path))
    metadata, tensors = read_weights(path)
    header = ClassifierHeader.from_metadata(metadata, path)
    try:
        classifier = Classifier(model, _preprocess_of(header, tensors), header)
    except ValueError as error:
        raise CheckpointError(f"`{path}` cannot be rebuilt: {error}") from error
    check_fit(classifier, tensors, path)
    classifier.load_state_dict(tensors)
    return classifier.eval()
