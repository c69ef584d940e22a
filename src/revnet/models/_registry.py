"""Models by name."""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from revnet.models._image_classifier import AbstractImageClassifier


class _Entry(NamedTuple):
    function: Callable[..., AbstractImageClassifier]
    image_size: int


_ENTRIES: dict[str, _Entry] = {}

EntryFunction = TypeVar("EntryFunction", bound=Callable[..., AbstractImageClassifier])


def register_model(*, image_size: int) -> Callable[[EntryFunction], EntryFunction]:
    """Make an entry function known to `create_model` under its own name; a decorator.

    The function takes `num_classes` and `in_channels`, with the published network's as defaults, and options of its
    own, all by keyword.

    Args:
        image_size: Side of the images for which the network was published.
    """

    def register(function: EntryFunction) -> EntryFunction:
        _ENTRIES[function.__name__] = _Entry(function, image_size)
        return function

    return register


def list_models() -> list[str]:
    """The names that `create_model` knows, sorted with numbers in numeric order."""
    return sorted(_ENTRIES, key=_in_numeric_order)


def published_image_size(name: str) -> int:
    """The side of the images for which a model of `list_models()` was published: 32 for CIFAR's, 224 for ImageNet's.

    Raises:
        ValueError: There is no model of that name.
    """
    return _entry(name).image_size


def create_model(
    name: str, *, num_classes: int | None = None, in_channels: int = 3, **options: Any
) -> AbstractImageClassifier:
    """Build a model of this library by its published name.

    Args:
        name: One of `list_models()`.
        num_classes: Size of the output; 0 for pooled features in place of logits. By default that of the published
            network: 10 for CIFAR's, 1000 for ImageNet's.
        in_channels: Channels of the input images: 3 for colour, 1 for grey.
        options: Further options of the model's entry function, such as `policy=Store()` for a reversible one.

    Returns:
        The model, freshly initialised from PyTorch's random state.

    Raises:
        ValueError: There is no model of that name, or a count is not positive.
        TypeError: The model has no such option.
    """
    if num_classes is not None:
        options["num_classes"] = num_classes
    return _entry(name).function(in_channels=in_channels, **options)


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        close = difflib.get_close_matches(str(name), _ENTRIES, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ValueError(f"`name` (={name!r}) is no model of revnet; {hint}the models are: {', '.join(list_models())}.")
    return _ENTRIES[name]


def _in_numeric_order(name: str) -> tuple[str, int]:
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)
