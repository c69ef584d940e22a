"""A module that a run saves, with the header that says how to build it again.

The `kind` in the header of a weights file distinguishes the three families; a classifier's header has none.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, cast

from torch import Tensor, nn

import revnet
from revnet.errors import CheckpointError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_FORMAT = "1"
_CLASSIFIER = "classifier"


class _Kind(NamedTuple):
    noun: str
    commands: str
    """Commands that take such weights."""
    attribute: str
    """Attribute of the task that holds the module."""


_KINDS = {
    _CLASSIFIER: _Kind("a classifier", "`revnet evaluate` or `revnet predict`", "classifier"),
    "nice": _Kind("a density of images", "`revnet sample` or `revnet score`", "density"),
    "lm": _Kind("a language model", "`revnet generate`", "language_model"),
}


class AbstractHeader(ABC):
    """Everything that it takes to rebuild a module, except its tensors: the base of three dataclasses."""

    kind: ClassVar[str]
    """Kind of module, as the header states it."""

    as_text: ClassVar[frozenset[str]] = frozenset({"model", "data"})
    """Fields that are stored as they are; the others are stored as JSON."""

    model: str
    """Name of the model."""

    def to_metadata(self) -> dict[str, str]:
        """Return the header as the flat strings that safetensors stores."""
        metadata = {"format": _FORMAT, "revnet_version": revnet.__version__}
        if self.kind != _CLASSIFIER:
            metadata["kind"] = self.kind
        for field in fields(cast("DataclassInstance", self)):
            value = getattr(self, field.name)
            metadata[field.name] = value if field.name in self.as_text else json.dumps(value)
        return metadata

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> Self:
        """Read what `to_metadata` returned.

        Args:
            metadata: The strings.
            path: File that they come from, for the error message.

        Raises:
            CheckpointError: The metadata are not revnet's, have a later format, or describe another kind of module.
        """
        check_metadata(metadata, path, cls.kind)
        values = {}
        try:
            for field in fields(cast("type[DataclassInstance]", cls)):
                if field.name in metadata or field.default is MISSING:
                    text = metadata[field.name]
                    values[field.name] = text if field.name in cls.as_text else _from_json(text)
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"`{path}` was not written by `revnet train`; its header is not revnet's.") from error


class SavedModule(nn.Module, ABC):
    """A module with a header: what a run trains, and saves."""

    header_type: ClassVar[type[AbstractHeader]]
    """Class of the header."""

    header: Any
    """Everything that it takes to rebuild the module, except its tensors."""
    model: nn.Module
    """The network inside."""

    @classmethod
    @abstractmethod
    def build(cls, header: Any, tensors: Mapping[str, Tensor]) -> Self:
        """Build the module of `header`; `tensors` will be loaded into it.

        Raises:
            TypeError, ValueError: The header is not valid here.
        """

    @classmethod
    def from_tensors(cls, header: AbstractHeader, tensors: Mapping[str, Tensor], path: Path) -> Self:
        """Rebuild the module from its state.

        Args:
            header: Header of the file.
            tensors: Tensors of the file, by their names in the module.
            path: The file, for the error message.

        Raises:
            CheckpointError: The module cannot be built, or the tensors do not fit it.
        """
        try:
            module = cls.build(header, tensors)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"`{path}` cannot be rebuilt: {error}") from error
        check_fit(module, tensors, path)
        module.load_state_dict(tensors)
        return module


def attribute_of_kind(metadata: Mapping[str, str]) -> str:
    """Return the attribute of a task that holds the module which `metadata` describes."""
    kind = metadata.get("kind", _CLASSIFIER)
    return _KINDS[kind].attribute if kind in _KINDS else kind


def check_metadata(metadata: Mapping[str, str], path: Path, kind: str) -> None:
    """Compare the metadata of the file at `path` with the kind that is expected.

    Raises:
        CheckpointError: The metadata have a later format, or describe another kind of module.
    """
    if "revnet_version" not in metadata:  # the caller reports which entry is missing
        return
    if metadata.get("format", _FORMAT) != _FORMAT:
        raise CheckpointError(
            f"`{path}` has format {metadata['format']} of revnet {metadata['revnet_version']}, this is revnet "
            f"{revnet.__version__} with format {_FORMAT}; update revnet."
        )
    actual_kind = metadata.get("kind", _CLASSIFIER)
    if actual_kind == kind:
        return
    if actual_kind not in _KINDS:
        raise CheckpointError(f"`{path}` has the kind `{actual_kind}`, which this revnet does not know; update revnet.")
    actual = _KINDS[actual_kind]
    raise CheckpointError(f"`{path}` holds {actual.noun}, not {_KINDS[kind].noun}; use {actual.commands}.")


def check_fit(module: SavedModule, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Compare `tensors`, read from `path`, with the state of `module`.

    Raises:
        CheckpointError: A tensor is missing, superfluous or of another shape; the message names the first one.
    """
    difference = first_difference(module.state_dict(), tensors, lacks="it lacks")
    if difference is not None:
        raise CheckpointError(
            f"`{path}` does not fit the model {module.header.model}: {difference}; pass a checkpoint of that model."
        )


def first_difference(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], *, lacks: str) -> str | None:
    """Describe the first tensor of a file that differs from the model's in name or shape; None if none does.

    Args:
        expected: Tensors of the model.
        actual: Tensors of the file.
        lacks: Subject and verb for a tensor that the file does not have, such as "it lacks".
    """
    in_model = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    in_file = {name: tuple(tensor.shape) for name, tensor in actual.items()}
    for name in sorted(in_model | in_file):
        if name not in in_file:
            return f"{lacks} the tensor `{name}`"
        if name not in in_model:
            return f"the model has no tensor `{name}`"
        if in_file[name] != in_model[name]:
            return f"`{name}` is {in_file[name]} in the file and {in_model[name]} in the model"
    return None


def _from_json(text: str) -> Any:
    value = json.loads(text)
    return tuple(value) if isinstance(value, list) else value
