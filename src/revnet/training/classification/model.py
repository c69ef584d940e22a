"""A classifier: a model with the preprocessing that it was trained with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from revnet.coupling import FixedPoint
from revnet.data import Preprocess
from revnet.models import AbstractImageClassifier, create_model
from revnet.nn import set_coupling
from revnet.training.run.checkpoint import load_module
from revnet.training.saved_module import AbstractHeader, SavedModule


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

    def __post_init__(self) -> None:
        _channels, _height, _width = self.image_shape  # a header of another shape is not revnet's

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
        images: (B, C, H, W), uint8. Output: (B, num_classes).
    """

    header_type: ClassVar[type[AbstractHeader]] = ClassifierHeader
    header: ClassifierHeader

    def __init__(self, model: AbstractImageClassifier, preprocess: Preprocess, header: ClassifierHeader) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        self.header = header

    @classmethod
    def create(cls, header: ClassifierHeader, preprocess: Preprocess, **options: Any) -> Self:
        """Make a classifier with random weights; the model takes the `options`, such as `policy=Store()`."""
        model = create_model(header.model, num_classes=header.num_classes, in_channels=header.in_channels, **options)
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
        buffers = {name.removeprefix("preprocess."): x for name, x in tensors.items() if name.startswith("preprocess.")}
        try:
            return cls.create(header, Preprocess(**buffers))
        except TypeError as error:
            raise ValueError("it lacks the tensors of its preprocessing, or has others.") from error

    def forward(self, images: Tensor) -> Tensor:
        """Classify raw images."""
        return self.model(self.preprocess(images))


def load_classifier(path: str | Path) -> Classifier:
    """Rebuild the classifier of a run of `revnet train`, on the CPU and in evaluation mode.

    Args:
        path: A `.safetensors` file, a `.ckpt` file, or the folder of a run, whose last weights are loaded.

    Raises:
        CheckpointError: The file does not exist, is truncated, was not written by revnet, holds another kind of model,
            or its tensors do not fit the model that it names.
    """
    return load_module(Classifier, path)
