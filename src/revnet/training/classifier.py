"""A model with the preprocessing that it was trained with: image bytes in, logits out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from revnet.coupling import FixedPoint
from revnet.data import Preprocess
from revnet.errors import CheckpointError
from revnet.models import AbstractImageClassifier, create_model
from revnet.nn import set_coupling
from revnet.training._product import AbstractHeader, begin_metadata, check_fit, check_metadata


@dataclass(frozen=True, kw_only=True)
class Header(AbstractHeader):
    """What it takes to rebuild a classifier, but the tensors."""

    model: str
    """Name of the model."""

    data: str
    """Data set, as it was named in the settings."""

    class_names: tuple[str, ...]
    """Names of the classes, in the order of the logits."""

    image_shape: tuple[int, int, int]
    """(C, H, W) of the images trained on."""

    preprocess: str
    """Kind of preprocessing."""

    is_resized: bool = False
    """Whether images of any size were brought to `image_shape`, or had it."""

    is_exact: bool = False
    """Whether the streams of reversible blocks lie on a fixed-point grid: the network of rounded residuals."""

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        """Number of image channels."""
        return self.image_shape[0]

    def to_metadata(self) -> dict[str, str]:
        """Give the header as the flat strings that safetensors stores."""
        return begin_metadata() | {
            "model": self.model,
            "data": self.data,
            "class_names": json.dumps(self.class_names),
            "image_shape": json.dumps(self.image_shape),
            "preprocess": self.preprocess,
            "is_resized": json.dumps(self.is_resized),
            "is_exact": json.dumps(self.is_exact),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> Self:
        """Read what `to_metadata` gave; `path` is for the error message.

        Raises:
            CheckpointError: The metadata are not revnet's, of a later format, or of no classifier.
        """
        check_metadata(metadata, path)
        try:
            class_names = tuple(json.loads(metadata["class_names"]))
            channels, height, width = json.loads(metadata["image_shape"])
            return cls(
                model=metadata["model"],
                data=metadata["data"],
                class_names=class_names,
                image_shape=(channels, height, width),
                preprocess=metadata["preprocess"],
                is_resized=bool(json.loads(metadata.get("is_resized", "false"))),
                is_exact=bool(json.loads(metadata.get("is_exact", "false"))),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"`{path}` was not written by `revnet train`; its header is not revnet's.") from error


class Classifier(nn.Module):
    """Bytes in, logits out: the `model` after the `preprocess` it was trained with.

    Shape:
        images: (B, C, H, W), uint8. Output: (B, num_classes).
    """

    def __init__(self, model: AbstractImageClassifier, preprocess: Preprocess, header: Header) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        self.header = header

    @classmethod
    def create(cls, header: Header, preprocess: Preprocess, **options: Any) -> Self:
        """Make a classifier with freshly drawn weights; `options` go to the model, such as `policy=Store()`."""
        model = create_model(header.model, num_classes=header.num_classes, in_channels=header.in_channels, **options)
        # Weights in this layout carry all activations into it, for which convolutions of few channels are faster.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # PyTorch's stubs lack it
        if header.is_exact:
            set_coupling(model, FixedPoint())
        return cls(model, preprocess, header)

    @classmethod
    def from_tensors(cls, header: Header, tensors: Mapping[str, Tensor], path: Path) -> Self:
        """Rebuild a classifier from its state; `path` is for the error message.

        Raises:
            CheckpointError: The model is unknown here, or the tensors do not fit it.
        """
        buffers = {name.removeprefix("preprocess."): x for name, x in tensors.items() if name.startswith("preprocess.")}
        try:
            classifier = cls.create(header, Preprocess(**buffers))
        except TypeError as error:
            raise CheckpointError(f"`{path}` lacks the tensors of its preprocessing, or has others.") from error
        except ValueError as error:
            raise CheckpointError(f"`{path}` cannot be rebuilt: {error}") from error
        check_fit(classifier, tensors, path)
        classifier.load_state_dict(tensors)
        return classifier

    def forward(self, images: Tensor) -> Tensor:
        """Classify raw images."""
        return self.model(self.preprocess(images))
