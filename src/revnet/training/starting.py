"""Start a run from trained weights."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from revnet._paths import absolute_path
from revnet.errors import CheckpointError
from revnet.models.pretrained.hub_files import is_hub_name
from revnet.models.pretrained.reading import NETWORK_PREFIX
from revnet.models.pretrained.shipped import find_pretrained
from revnet.models.pretrained.tensor_file import first_difference
from revnet.training.run.checkpoint import find_weights, read_weights
from revnet.training.saved_module import AbstractHeader

_Header = TypeVar("_Header", bound=AbstractHeader)


class StartWeights(NamedTuple):
    """Trained weights to start from."""

    path: Path
    """File of the weights."""
    header: Any
    """Its header."""
    network: dict[str, Tensor]
    """Tensors of the network, by their names in it."""
    others: dict[str, Tensor]
    """Other tensors of the file, such as the statistics of the preprocessing."""


def absolute_weights(weights: str | None) -> str | None:
    """Return the absolute path of the weights of a run, which can be resumed in any working directory.

    A name on the hub, or of weights in the package, stays a name.
    """
    if weights is None or is_hub_name(weights) or find_pretrained(weights) is not None:
        return weights
    return absolute_path(weights)


def read_start_weights(weights: str, header_type: type[_Header]) -> StartWeights:
    """Read the weights of another run, and check that they are of the same task.

    Raises:
        CheckpointError: The file does not exist, is truncated, or holds another kind of model.
    """
    path = find_weights(Path(weights))
    metadata, tensors = read_weights(path)
    header = header_type.from_metadata(metadata, path)
    network = {
        name.removeprefix(NETWORK_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(NETWORK_PREFIX)
    }
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(NETWORK_PREFIX)}
    return StartWeights(path, header, network, others)


def load_start_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], path: Path, *, new: Collection[str] = ()
) -> None:
    """Load `tensors` into `model`, except the names in `new`, which keep their random weights.

    Raises:
        CheckpointError: Another tensor is missing, superfluous or of another shape; the message names the first one.
    """
    loaded = {name: tensor for name, tensor in tensors.items() if name not in new}
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in new}
    difference = first_difference(expected, loaded, lacks="they lack")
    if difference is not None:
        raise CheckpointError(
            f"`weights` (='{path}') do not fit the model: {difference}; pass weights of the same model, or the "
            "settings of the model that they are from."
        )
    model.load_state_dict(loaded, strict=False)


def describe_start(path: Path, new: Collection[str], reason: str = "") -> str:
    """Return the file and the names that were not loaded as text."""
    if not new:
        return f"{path}, all loaded"
    return f"{path}, except {', '.join(sorted(new))}, which {'is' if len(new) == 1 else 'are'} new{reason}"
