"""Checks of arguments.

The error messages are one line long. They name the argument in backticks, show its value, and say which rule the value
breaks and what to pass instead.
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
import torch.fx
from torch import Tensor, nn

MOST_LAYERS = 100_000
"""Largest number of layers. Building more layers would take minutes."""
MOST_CHANNELS = 2**20
"""Largest width of a layer. The matrices of a wider layer do not fit into memory."""
_MOST = 2**31 - 1
_NUMBERS = (torch.int64, torch.int32)
"""Types of a mask with the number of the document of each token."""
_LONGEST = 60
"""Number of characters of a value in a message."""


def describe(value: object) -> str:
    """Return `value` in one short line, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    try:
        text = " ".join(repr(value).split())
    except Exception:  # For instance for an integer of 5,000 digits.
        return f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def describe_kind(value: object) -> str:
    """Return the kind of object that `value` is, such as "tuple of 3" or "ndarray", for a message."""
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether `value` is an integer. A bool does not count."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is a finite number. A bool does not count."""
    # Compare instead of converting, because an integer may be too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_count(name: str, value: Any, *, least: int = 1, most: int = _MOST, hint: str = "") -> None:
    """Raise unless `value` is an integer from `least` to `most`.

    Args:
        name: Name of the argument.
        value: The argument.
        least: Smallest value allowed.
        most: Largest value allowed.
        hint: What to pass instead, such as "2 halves the image".
    """
    if is_integer(value) and least <= value <= most:
        return
    hint = f"; {hint}" if hint else ""
    if is_integer(value) and value > most:
        raise ValueError(f"`{name}` (={describe(value)}) must be at most {most:,}{hint}.")
    rule = {0: "a positive integer, or 0", 1: "a positive integer"}.get(least, f"an integer of at least {least}")
    raise ValueError(f"`{name}` (={describe(value)}) must be {rule}{hint}.")


def check_counts(*, most: int = _MOST, **counts: Any) -> None:
    """Raise unless each of `counts` is an integer from 1 to `most`."""
    for name, value in counts.items():
        check_count(name, value, most=most)


def check_bool(**flags: Any) -> None:
    """Raise unless each of `flags` is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"`{name}` (={describe(value)}) must be True or False.")


def check_share(*, below_one: bool = True, **shares: Any) -> None:
    """Raise unless each of `shares` is a number from 0 to 1, or from 0 to below 1."""
    for name, share in shares.items():
        if not is_number(share) or not 0 <= share <= 1 or (below_one and share == 1):
            rule = "from 0 to below 1; 0 drops nothing" if below_one else "from 0 to 1"
            raise ValueError(f"`{name}` (={describe(share)}) must be a number {rule}.")


def check_positive_number(name: str, value: Any, *, hint: str) -> None:
    """Raise unless `value` is a positive number. `hint` gives a usual value."""
    if not is_number(value) or value <= 0:
        raise ValueError(f"`{name}` (={describe(value)}) must be a positive number; {hint}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` (={describe(value)}) must be {' or '.join(map(repr, choices))}.")


def is_path(value: object) -> TypeGuard[str | os.PathLike[str]]:
    """Return whether `value` is a path: a string, or an object such as `pathlib.Path`. `pathlib` takes no bytes."""
    return isinstance(value, str | os.PathLike) and not isinstance(os.fspath(value), bytes)


def check_path(name: str, value: Any, *, hint: str) -> None:
    """Raise unless `value` is a path. `hint` says what to pass."""
    if not is_path(value):
        raise TypeError(f"`{name}` (={describe(value)}) must be a path; pass {hint}.")


def check_paths(name: str, values: Any) -> list[Any]:
    """Return `values` as a list; raise unless they are paths. A single path is not a list of paths."""
    if isinstance(values, str | os.PathLike):
        path = os.fspath(values)
        raise TypeError(f"`{name}` (={path!r}) must be a list of files; pass [{path!r}].")
    if not isinstance(values, Iterable) or isinstance(values, bytes):
        raise TypeError(f"`{name}` (={describe(values)}) must be a list of files; pass ['photo.jpg'], for instance.")
    paths = list(values)
    for path in paths:
        if not is_path(path):
            raise TypeError(
                f"`{name}` holds {describe(path)}, but must be a list of paths; pass strings, or objects of `pathlib`."
            )
    return paths


def check_module(name: str, value: Any, *, hint: str = "pass a model") -> None:
    """Raise unless `value` is a module. `hint` says what to pass."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"`{name}` (={describe(value)}) must be an nn.Module; {hint}.")


def check_tensor(name: str, value: Any, *, hint: str = "convert it with `torch.as_tensor`") -> None:
    """Raise unless `value` is a tensor. `hint` says how to make one."""
    if not isinstance(value, Tensor | torch.fx.Proxy):  # `torch.fx` traces with proxies.
        raise TypeError(f"`{name}` (={describe(value)}) must be a tensor; {hint}.")


def check_floating(name: str, value: Tensor) -> None:
    """Raise unless the tensor `value` is floating-point. Complex numbers are not."""
    if not value.is_floating_point():
        conversion = "real" if value.is_complex() else "float()"
        raise TypeError(f"`{name}` has dtype {value.dtype}, but must be floating-point; pass `{name}.{conversion}`.")


def check_mask(mask: Any, shape: Sequence[int], *, takes_documents: bool = False, name: str = "mask") -> None:
    """Raise unless `mask` is None, or a bool tensor of `shape`, (B, T), or the number of each token's document."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or (takes_documents and mask.dtype in _NUMBERS)):
        shown = str(mask.dtype) if isinstance(mask, Tensor) else describe(mask)
        kinds = "a bool tensor, true where a token is real" + (", or numbers of documents" if takes_documents else "")
        way_out = (
            "; numbers of documents are for full attention"
            if isinstance(mask, Tensor) and mask.dtype in _NUMBERS
            else ""
        )
        raise TypeError(f"`{name}` (={shown}) must be {kinds}; pass `{name}.bool()`{way_out}.")
    if mask.shape != tuple(shape):
        raise ValueError(
            f"`{name}` has shape {tuple(mask.shape)}, but must have the shape of the tokens, {tuple(shape)}: (B, T)."
        )


def check_per_head(**tensors: Any) -> None:
    """Raise unless each of `tensors` is floating-point and (B, H, T, D)."""
    for name, value in tensors.items():
        check_tensor(name, value, hint="pass (B, H, T, D)")
        if value.dim() != 4:
            raise ValueError(
                f"`{name}` has shape {tuple(value.shape)}, but must have (B, H, T, D): batch, heads, tokens, features."
            )
        check_floating(name, value)


def check_same_heads(name: str, value: Tensor, like: Tensor, *, num_dims: int = 4) -> None:
    """Raise unless `value` has the first `num_dims` sizes of `like`."""
    if value.shape[:num_dims] != like.shape[:num_dims]:
        rule = "the shape of the queries" if num_dims == 4 else "the batch, heads and tokens of the queries"
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)}, but must have {rule}, {tuple(like.shape[:num_dims])}."
        )


def check_block_size(block_size: Any) -> None:
    """Raise unless `block_size` is a positive even integer."""
    check_count("block_size", block_size)
    if block_size % 2:
        raise ValueError(
            f"`block_size` (={block_size}) must be even, because the level below has covered half of each block; pass "
            f"{block_size + 1}."
        )


def check_generator(generator: Any) -> None:
    """Raise unless `generator` is a `torch.Generator` or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"`generator` (={describe(generator)}) must be a `torch.Generator`, or None for PyTorch's random state."
        )


def check_step_arguments(model: Any, kwargs: Any, loss: Any, autocast: Any) -> None:
    """Raise unless these can describe a training step: a module, its keyword arguments, a loss and a dtype."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` (={type(model).__name__}) must be a module.")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"`kwargs` (={type(kwargs).__name__}) must be a dict of the model's keyword arguments, or None."
        )
    if loss is not None and not callable(loss):
        raise TypeError(f"`loss` (={loss!r}) must be a function from the model's output to a scalar, or None.")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise TypeError(f"`autocast` (={autocast!r}) must be `torch.bfloat16`, `torch.float16` or None.")
