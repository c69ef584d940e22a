"""Find what a checkpoint cannot hold: values that are not read back, because reading executes nothing."""

import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from revnet._checks import describe

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CONTAINERS = (dict, OrderedDict, list, tuple, set)


def without_foreign_states(checkpoint: Mapping[str, Any], warned: set[str]) -> dict[str, Any]:
    """Return a checkpoint without the states of callbacks that could not be read again, and warn about each once.

    Args:
        checkpoint: The checkpoint, as Lightning makes it.
        warned: Callbacks that were warned about, which is updated.
    """
    states = checkpoint.get("callbacks", {})
    faults = {name: fault for name, state in states.items() if (fault := _find_foreign(state, "state")) is not None}
    for name in faults.keys() - warned:
        warnings.warn(
            f"the state of the callback `{name}` is not saved, so a run that continues begins with a new one, because "
            f"{faults[name]}; return numbers, texts, tensors, and dicts and lists of them from `state_dict`.",
            stacklevel=2,
        )
    warned |= faults.keys()
    if not faults:
        return dict(checkpoint)
    return {**checkpoint, "callbacks": {name: state for name, state in states.items() if name not in faults}}


def _find_foreign(value: Any, place: str) -> str | None:
    """Return where a value holds something that `torch.load(weights_only=True)` refuses, and what; None for nothing."""
    if type(value) in _PLAIN or isinstance(value, Tensor):
        return None
    parts: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        parts = [
            pair for key, item in value.items() for pair in ((f"a key of {place}", key), (f"{place}[{key!r}]", item))
        ]
    elif isinstance(value, list | tuple | set | frozenset):
        parts = [(f"{place}[{index}]", item) for index, item in enumerate(value)]
    for inner, part in parts:
        if (fault := _find_foreign(part, inner)) is not None:
            return fault
    if type(value) in _CONTAINERS or _can_return(value):
        return None
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return f"{place} is {describe(value)}, of the type {kind}"


def _can_return(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError):
        return False
    return True
