"""Models by name."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from revnet._checks import check_bool, check_count, describe
from revnet.models._image_classifier import AbstractImageClassifier
from revnet.models.pretrained.shipped import list_pretrained, trained_folder


@dataclass(frozen=True)
class _ModelEntry:
    function: Callable[..., AbstractImageClassifier]
    image_size: int


_ENTRIES: dict[str, _ModelEntry] = {}

EntryFunction = TypeVar("EntryFunction", bound=Callable[..., AbstractImageClassifier])


def register_model(*, image_size: int) -> Callable[[EntryFunction], EntryFunction]:
    """Register an entry function, so that `create_model` knows it by its name. This is a decorator.

    The function takes `num_classes` and `in_channels`, whose defaults are the values of the published network, and
    additional options, all by keyword.

    Args:
        image_size: Side of the images for which the network was published.

    Raises:
        ValueError: `image_size` is not a positive integer.
    """
    check_count("image_size", image_size)

    def register(function: EntryFunction) -> EntryFunction:
        _ENTRIES[function.__name__] = _ModelEntry(function, image_size)
        return function

    return register


def list_models() -> list[str]:
    """Return the names that `create_model` knows, sorted with numbers in numeric order.

    Example:
        >>> from revnet import list_models
        >>> "revnet110" in list_models()
        True
    """
    return sorted(_ENTRIES, key=_in_numeric_order)


def published_image_size(name: str) -> int:
    """Return the side of the images for which a model was published: 32 for CIFAR, 224 for ImageNet.

    Args:
        name: One of `list_models()`.

    Raises:
        ValueError: No model has this name.
    """
    return _entry(name).image_size


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    in_channels: int | None = None,
    **options: Any,
) -> AbstractImageClassifier:
    """Build a model of this library by its published name.

    Args:
        name: One of `list_models()`; with `pretrained`, also one of `list_pretrained()`, such as "revnet38.digits".
        pretrained: Whether to load trained weights, which come with the package. The network is then in evaluation
            mode. Another `num_classes` replaces its head by a new one.
        num_classes: Size of the output, or 0 for pooled features instead of logits. The default is the number of the
            published network: 10 for CIFAR, 1000 for ImageNet.
        in_channels: Channels of the input images: 3 for color, which is the default, 1 for gray.
        options: Additional options of the model's entry function, such as `policy=Store()` for a reversible model.

    Returns:
        The model, initialized from PyTorch's random state.

    Raises:
        ValueError: No model has this name, there are no trained weights for it, or a count is not positive.
        TypeError: The model does not have one of the options.
        CheckpointError: The trained weights are damaged.

    Example:
        >>> import torch
        >>> from revnet import create_model
        >>> model = create_model("revnet38", num_classes=10)
        >>> model(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    if num_classes is not None:
        options["num_classes"] = num_classes
    check_bool(pretrained=pretrained)
    if pretrained:
        return _trained(name, in_channels, options)
    return _entry(name).function(in_channels=3 if in_channels is None else in_channels, **options)


def _trained(name: str, in_channels: int | None, options: dict[str, Any]) -> AbstractImageClassifier:
    model = AbstractImageClassifier.from_pretrained(trained_folder(name), **options)
    if in_channels not in (None, model.in_channels):
        raise ValueError(
            f"`in_channels` (={in_channels}) must be {model.in_channels}, as in the trained weights of '{name}'; leave "
            "it out, or build the model without `pretrained`."
        )
    return model


def _entry(name: str) -> _ModelEntry:
    if not isinstance(name, str) or name not in _ENTRIES:
        if isinstance(name, str) and name in list_pretrained():
            raise ValueError(f"`name` (={name!r}) is the name of trained weights; pass `pretrained=True` with it.")
        close = difflib.get_close_matches(describe(name).strip("'"), _ENTRIES, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ValueError(f"`name` (={describe(name)}) is not a model of revnet; {hint}`revnet models` lists them.")
    return _ENTRIES[name]


def _in_numeric_order(name: str) -> tuple[str, int]:
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)
