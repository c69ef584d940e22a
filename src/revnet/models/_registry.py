"""Models by name."""

import difflib
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

_ENTRY_FUNCTIONS: dict[str, Callable[..., nn.Module]] = {}

EntryFunction = TypeVar("EntryFunction", bound=Callable[..., nn.Module])


def register_model(function: EntryFunction) -> EntryFunction:
    """Make an entry function known to `create_model` under its own name; a decorator."""
    _ENTRY_FUNCTIONS[function.__name__] = function
    return function


def list_models() -> list[str]:
    """The names that `create_model` knows, sorted with numbers in numeric order."""
    return sorted(_ENTRY_FUNCTIONS, key=_in_numeric_order)


def create_model(name: str, *, num_classes: int = 10, in_channels: int = 3, **options: Any) -> nn.Module:
    """Build a model of this library by its published name.

    Args:
        name: One of `list_models()`.
        num_classes: Size of the output.
        in_channels: Channels of the input images: 3 for colour, 1 for grey.
        options: Further options of the model's entry function, such as `policy=Store()` for a reversible one.

    Returns:
        The model, freshly initialised from PyTorch's random state.

    Raises:
        ValueError: There is no model of that name, or a count is not positive.
        TypeError: The model has no such option.
    """
    if name not in _ENTRY_FUNCTIONS:
        close = difflib.get_close_matches(str(name), _ENTRY_FUNCTIONS, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ValueError(f"`name` (={name!r}) is no model of revnet; {hint}the models are: {', '.join(list_models())}.")
    return _ENTRY_FUNCTIONS[name](num_classes=num_classes, in_channels=in_channels, **options)


def _in_numeric_order(name: str) -> tuple[str, int]:
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)
