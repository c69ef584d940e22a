"""A module that a run saves, with the header that says how to build it again.

The `kind` in the header of a weights file distinguishes the three families; a classifier's header has none.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, cast, get_args, get_origin

from torch import Tensor, nn

import revnet
from revnet._documents import parse_json_value
from revnet._outside_text import encodable, shorten
from revnet.errors import CheckpointError
from revnet.models.pretrained.hub_files import Download
from revnet.models.pretrained.mixin import HubMixin, remember
from revnet.models.pretrained.outline import build_outline
from revnet.models.pretrained.reading import (
    NETWORK_PREFIX,
    RUN_KEY,
    Pretrained,
    header_of,
    read_pretrained,
    run_entries,
)
from revnet.models.pretrained.structure import apply_structure
from revnet.models.pretrained.tensor_file import first_difference

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_FORMAT = "1"
_CLASSIFIER = "classifier"
_MOST = 2**31
"""Limit of the integers in a header."""


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
            metadata[field.name] = encodable(value) if field.name in self.as_text else json.dumps(value)
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
                    value = text if field.name in cls.as_text else _from_json(text)
                    if not _has_type(value, field.type):
                        raise TypeError(f"{field.name} is not of the type {field.type}")
                    values[field.name] = value
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
            outline = build_outline(lambda: cls.build(header, tensors), tensors)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"`{path}` cannot be rebuilt: {error}") from error
        # Before memory is allocated: a file from a stranger may describe a model of any size.
        check_fit(outline, tensors, path)
        module = cls.build(header, tensors)
        module.load_state_dict(tensors)
        return module

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load the module of a run, with everything around its network, in evaluation mode.

        Policies, couplings and batch norms are the ones of the run.

        Args:
            pretrained_model_name_or_path: The folder of a run, whose last weights are loaded; one of its `.safetensors`
                files; a folder that `save_pretrained` or `revnet push` has written; or a name on the Hugging Face hub,
                such as `owner/name` or `hub:owner/name@revision`.
            options: How to download from the hub: `revision`, `token`, `cache_dir`, `force_download`,
                `local_files_only`.

        Raises:
            CheckpointError: The module does not exist, it is of another kind, its files are damaged, or the hub cannot
                be reached.
            TypeError: An option is unknown, or has the wrong type.
        """
        pretrained = read_pretrained(pretrained_model_name_or_path, Download(**options))
        module = cls.from_tensors(cls._header_of(pretrained), _tensors_of(pretrained), pretrained.path).eval()
        try:
            apply_structure(module.model, pretrained.config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"`{pretrained.path}` cannot be rebuilt: {error}") from error
        if isinstance(module.model, HubMixin):
            remember(module.model, pretrained)
        return module

    def save_pretrained(self, save_directory: str | Path, *, card: str | None = None, **options: Any) -> str | None:
        """Write the module to a folder that `from_pretrained` reads, of this class and of the class of the network.

        Args:
            save_directory: The folder, which is made if it does not exist.
            card: Text of the model card; None for a short one.
            options: Arguments of the network's `save_pretrained`.

        Raises:
            ValueError: The network is your own code, which a file cannot hold.
        """
        return self._network_with_run().save_pretrained(save_directory, card=card, **options)

    def push_to_hub(self, repo_id: str, *, card: str | None = None, **options: Any) -> str:
        """Send the files of `save_pretrained` to the Hugging Face hub, in one commit, and return its address.

        Args:
            repo_id: Name on the hub, `owner/name`; it is made if it does not exist.
            card: Text of the model card; None for a short one.
            options: Arguments of the network's `push_to_hub`, such as `private` and `branch`.

        Raises:
            CheckpointError: The hub cannot be reached, or refuses the files.
            ValueError: The network is your own code, which a file cannot hold.
        """
        return self._network_with_run().push_to_hub(repo_id, card=card, **options)

    def _network_with_run(self) -> HubMixin:
        """Return the network, which now knows the header and the other tensors of this module."""
        if not isinstance(self.model, HubMixin):
            raise ValueError(
                f"`{self.header.model}` is your own code, which a file of weights cannot hold; share the code and the "
                "file of weights, and load it with `load_classifier(path, model=...)`."
            )
        before = self.model.pretrained_config
        entries = run_entries(self.header.to_metadata())
        entries[RUN_KEY] = {**before.get(RUN_KEY, {}), **entries[RUN_KEY]}  # the epoch stays
        self.model.pretrained_config = {**before, **entries}
        state = self.state_dict()
        self.model._pretrained_tensors = {
            name: tensor for name, tensor in state.items() if not name.startswith(NETWORK_PREFIX)
        }
        return self.model

    @classmethod
    def _header_of(cls, pretrained: Pretrained) -> AbstractHeader:
        metadata = header_of(pretrained)
        if metadata is None:
            raise CheckpointError(
                f"`{pretrained.path}` is a network without the labels and the preprocessing of a run; load it with "
                "`revnet.models.from_pretrained`."
            )
        return cls.header_type.from_metadata(metadata, pretrained.path)


def _tensors_of(pretrained: Pretrained) -> dict[str, Tensor]:
    """Return the tensors of a module of a run, by their names in it."""
    network = {f"{NETWORK_PREFIX}{name}": tensor for name, tensor in pretrained.tensors.items()}
    return network | pretrained.others


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
            f"`{path}` has format {shorten(metadata['format'], 20)} of revnet "
            f"{shorten(metadata['revnet_version'], 20)}, this is revnet {revnet.__version__} with format {_FORMAT}; "
            "update revnet."
        )
    actual_kind = metadata.get("kind", _CLASSIFIER)
    if actual_kind == kind:
        return
    if actual_kind not in _KINDS:
        raise CheckpointError(
            f"`{path}` has the kind `{shorten(actual_kind)}`, which this revnet does not know; update revnet."
        )
    actual = _KINDS[actual_kind]
    raise CheckpointError(f"`{path}` holds {actual.noun}, not {_KINDS[kind].noun}; use {actual.commands}.")


def check_fit(module: SavedModule, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Compare `tensors`, read from `path`, with the state of `module`.

    Raises:
        CheckpointError: A tensor is missing, superfluous, or of another shape or type; the message names the first one.
    """
    difference = first_difference(module.state_dict(), tensors, lacks="it lacks")
    if difference is not None:
        raise CheckpointError(
            f"`{path}` does not fit the model {module.header.model}: {difference}; pass a checkpoint of that model."
        )


def _from_json(text: str) -> Any:
    value = parse_json_value(text)
    return tuple(value) if isinstance(value, list) else value


def _has_type(value: Any, annotation: Any) -> bool:
    """Return whether `value`, read from JSON, suits the annotation of a field of a header."""
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if origin is UnionType:
        return any(_has_type(value, argument) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(value) == len(kinds) and all(map(_has_type, value, kinds))
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST
    if origin is Mapping:
        return isinstance(value, dict) and all(map(_is_option, value.values()))
    return isinstance(value, origin)


def _is_option(value: Any) -> bool:
    """Return whether `value` is a plain value, or a flat list of them, and not an enormous number."""
    if isinstance(value, list):
        return not any(isinstance(item, list) for item in value) and all(map(_is_option, value))
    if isinstance(value, int):
        return abs(value) < _MOST
    return value is None or isinstance(value, str | float)
