"""What the weights of a run are of: a module, and a header that says how to build it again.

A file of weights is told from others by the `kind` in its header; that of a classifier has none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

import revnet
from revnet.errors import CheckpointError

_FORMAT = "1"
_CLASSIFIER = "classifier"


class _Kind(NamedTuple):
    noun: str
    commands: str
    """What takes such weights."""
    lack: str
    """What those of any other kind do not have."""


_KINDS = {
    _CLASSIFIER: _Kind("a classifier", "`revnet evaluate` or `revnet predict`", "knows no classes"),
    "nice": _Kind("a density of images", "`revnet sample`", "has no prior to sample images from"),
    "lm": _Kind("a language model", "`revnet generate`", "writes no text"),
}


class AbstractHeader(ABC):
    """What it takes to rebuild a module, but the tensors."""

    model: str
    """Name of the model."""

    @abstractmethod
    def to_metadata(self) -> dict[str, str]:
        """Give the header as the flat strings that safetensors stores."""


class Product(Protocol):
    """A module with a header."""

    @property
    def header(self) -> AbstractHeader:
        """What it takes to rebuild it."""

    def state_dict(self) -> dict[str, Any]:
        """Its tensors."""


def begin_metadata(kind: str | None = None) -> dict[str, str]:
    """What every header begins with."""
    return {"format": _FORMAT, "revnet_version": revnet.__version__} | ({} if kind is None else {"kind": kind})


def check_metadata(metadata: Mapping[str, str], path: Path, kind: str = _CLASSIFIER) -> None:
    """Compare the metadata of the file at `path` with what is asked for.

    Raises:
        CheckpointError: They are of a later format, or of another kind of model.
    """
    if "revnet_version" not in metadata:  # what is missing is told by whoever reads it
        return
    if metadata.get("format", _FORMAT) != _FORMAT:
        raise CheckpointError(
            f"`{path}` has format {metadata['format']} of revnet {metadata['revnet_version']}, this is revnet "
            f"{revnet.__version__} with format {_FORMAT}; update revnet."
        )
    found = metadata.get("kind", _CLASSIFIER)
    if found == kind:
        return
    if found not in _KINDS:
        raise CheckpointError(f"`{path}` is of the kind `{found}`, which this revnet does not know; update revnet.")
    noun, commands, _ = _KINDS[found]
    raise CheckpointError(f"`{path}` is {noun}, which {_KINDS[kind].lack}; use {commands}.")


def check_fit(product: Product, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Compare `tensors`, read from `path`, with the state of `product`.

    Raises:
        CheckpointError: A tensor is missing, superfluous or of another shape; the first one is named.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in product.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected == found:
        return
    name = next(name for name in sorted(expected | found) if expected.get(name) != found.get(name))
    if name not in found:
        difference = f"it lacks the tensor `{name}`"
    elif name not in expected:
        difference = f"the model has no tensor `{name}`"
    else:
        difference = f"`{name}` is {found[name]} in the file and {expected[name]} in the model"
    raise CheckpointError(
        f"`{path}` does not fit the model {product.header.model}: {difference}; pass a checkpoint of that model."
    )
