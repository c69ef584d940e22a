"""Checks of arguments that several models share."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from revnet._checks import (
    MOST_CHANNELS,
    MOST_LAYERS,
    check_count,
    check_floating,
    check_tensor,
    describe,
    is_integer,
    is_number,
)
from revnet._torch_release import is_autocast_on
from revnet._units import counted


def check_num_classes(num_classes: Any) -> None:
    """Raise an error unless `num_classes` is a positive integer or 0."""
    if not is_integer(num_classes) or num_classes < 0:
        raise ValueError(
            f"`num_classes` (={describe(num_classes)}) must be a positive integer, or 0 for pooled features instead of "
            "logits."
        )
    check_count("num_classes", num_classes, least=0)


def check_sequence(name: str, values: Any, *, example: str) -> None:
    """Raise an error unless `values` is a sequence. The error message shows `example`."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise TypeError(f"`{name}` (={describe(values)}) must be a sequence of integers, for instance {example}.")


def check_counts_of(name: str, values: Any, *, most: int, example: str) -> None:
    """Raise an error unless `values` is a sequence of integers from 1 to `most`."""
    check_sequence(name, values, example=example)
    for index, value in enumerate(values):
        check_count(f"{name}[{index}]", value, most=most)


def check_stages(num_blocks: Any, widths: Any, *, multiple_of: int = 1, may_shrink: bool = False) -> None:
    """Raise an error unless `widths` has a valid width for the stem and each stage of `num_blocks`."""
    check_sequence("widths", widths, example="(16, 16, 32, 64)")
    check_counts_of("num_blocks", num_blocks, most=MOST_LAYERS, example="(3, 3, 3)")
    if not num_blocks:
        raise ValueError(f"`num_blocks` (={describe(num_blocks)}) must have at least one stage, such as (3, 3, 3).")
    if len(widths) != len(num_blocks) + 1:
        raise ValueError(
            f"`widths` (={describe(tuple(widths))}) must have one width for the stem and one for each of the "
            f"{len(num_blocks)} stages of `num_blocks`, {len(num_blocks) + 1} in all."
        )
    for stage, width in enumerate(widths):
        check_count(f"widths[{stage}]", width, most=MOST_CHANNELS)
        if width % multiple_of:
            raise ValueError(
                f"`widths[{stage}]` (={width}) must be a multiple of {multiple_of}, since a reversible block splits "
                f"the channels in two; use {width + multiple_of - width % multiple_of}."
            )
        if stage and width < widths[stage - 1] and not may_shrink:
            raise ValueError(
                f"`widths` (={describe(tuple(widths))}) must not shrink: the shortcut between stages of basic blocks "
                "can only add channels; widen the later stages, or use block='bottleneck', whose shortcut is a "
                "convolution."
            )


def check_ratio(name: str, ratio: Any, dim: int) -> None:
    """Raise an error unless `ratio` is a positive number and `ratio * dim` a valid width."""
    if not is_number(ratio) or ratio <= 0:
        raise ValueError(f"`{name}` (={describe(ratio)}) must be a positive number; 4 is usual.")
    if ratio * dim < 1:
        raise ValueError(
            f"`{name}` (={describe(ratio)}) must give at least one feature, but {describe(ratio)} * {dim} is "
            f"{ratio * dim:.2g}; 4 is usual."
        )
    if ratio * dim > MOST_CHANNELS:
        raise ValueError(f"`{name}` (={describe(ratio)}) must give at most {MOST_CHANNELS:,} features; 4 is usual.")


def check_heads(dim: int, num_heads: int) -> None:
    """Raise an error unless `dim` is a multiple of `num_heads`."""
    if dim % num_heads:
        raise ValueError(
            f"`dim` (={dim}) must be a multiple of `num_heads` (={num_heads}), since the heads share the features; "
            f"pass {dim + num_heads - dim % num_heads}, or another number of heads."
        )


def check_images(x: Any) -> None:
    """Raise an error unless `x` is a floating-point batch of images."""
    check_tensor("x", x)
    if x.dim() != 4:
        raise ValueError(
            f"`x` (of shape {tuple(x.shape)}) must be (B, C, H, W), a batch of images; for one image pass `x[None]`."
        )
    check_floating("x", x)


def explain_input_errors(
    model: nn.Module, function: Callable[[Tensor], Any], x: Tensor, in_channels: int | None, *, name: str = "x"
) -> Any:
    """Return `function(x)`, the work of `model`. If it fails because of the dtype or shape of `x`, say so in one line.

    The first layer checks both in any case, and a check up front would refuse what hooks and sharding convert. So this
    looks at `x` only after an error.

    Args:
        model: The model.
        function: A function that computes with the weights of the model.
        x: Its argument.
        in_channels: Number of channels that `x` must have; None for codes, whose shape is known to fit.
        name: Name of `x` in the messages.
    """
    if torch.compiler.is_compiling():  # a graph cannot break within `try`
        return function(x)
    try:
        return function(x)
    except (RuntimeError, ValueError) as error:
        _raise_input_error(model, x, in_channels, name, error)


def _raise_input_error(model: nn.Module, x: Tensor, in_channels: int | None, name: str, error: Exception) -> NoReturn:
    """Raise an error that explains `error` by the input, or `error` itself."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), x.dtype)
    # Autocast converts both to its own dtype, except for float64.
    is_autocast = is_autocast_on(x.device.type)
    if x.dtype != dtype and (not is_autocast or torch.float64 in (x.dtype, dtype)):
        conversion = _CONVERSIONS.get(dtype, f".to({dtype})")
        raise TypeError(
            f"`{name}` has dtype {x.dtype}, but the weights of the model have {dtype}; pass `{name}{conversion}`, or "
            f"convert the model with `model.to({x.dtype})`."
        ) from error
    if in_channels is None:
        raise error
    if x.shape[1] != in_channels:
        hint = "; for channels in the last dimension pass `x.movedim(-1, 1)`" if x.shape[-1] == in_channels else ""
        raise ValueError(
            f"`x` (of shape {tuple(x.shape)}) has {counted(x.shape[1], 'channel')}, but must have {in_channels}, as "
            f"the model was built with `in_channels={in_channels}`{hint or '; build it with another number'}."
        ) from error
    if 0 in x.shape[2:]:
        raise ValueError(f"`x` (of shape {tuple(x.shape)}) must not be empty; pass larger sides.") from error
    raise error


_CONVERSIONS = {
    torch.float32: ".float()",
    torch.float64: ".double()",
    torch.float16: ".half()",
    torch.bfloat16: ".bfloat16()",
}


def check_tokens(tokens: Any, *, most: int, name: str = "tokens") -> None:
    """Raise an error unless `tokens` is a batch of sequences of at most `most` integers."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        shown = str(tokens.dtype) if isinstance(tokens, Tensor) else describe(tokens)
        raise TypeError(f"`{name}` (={shown}) must be a tensor of integers; pass `{name}.long()`.")
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(
            f"`{name}` has shape {tuple(tokens.shape)}, but must have (B, T), T at least 1; pass `{name}[None]` for "
            "one sequence."
        )
    if tokens.shape[1] > most:
        raise ValueError(
            f"`{name}` has {tokens.shape[1]} positions, more than `max_length` (={most}); build the model with a "
            "larger value, or pass shorter sequences."
        )
