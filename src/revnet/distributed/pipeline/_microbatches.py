"""Divide a batch into microbatches."""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from revnet._checks import describe


def split(name: str, value: Any, num_microbatches: int, hint: str = "") -> list[Any]:
    """Return the microbatches of a batch: views of its tensors along the first dimension. Other values are repeated.

    Args:
        name: The name of the argument, for error messages.
        value: A tensor, or a nested structure of tensors and other values.
        num_microbatches: The number of microbatches.
        hint: The end of the error message.

    Raises:
        ValueError: The first dimension of a tensor is not a multiple of `num_microbatches`.
    """
    leaves, structure = tree_flatten(value)
    columns = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            columns.append([leaf] * num_microbatches)
            continue
        size = leaf.shape[0] if leaf.dim() else 0
        if size == 0 or size % num_microbatches:
            raise ValueError(
                f"`{name}` (of shape {tuple(leaf.shape)}) cannot be divided into `num_microbatches` "
                f"(={num_microbatches}) equal parts along its first dimension; "
                + (hint or "pad or shorten the batch, for instance with `drop_last=True` in the DataLoader.")
            )
        columns.append(list(leaf.split(size // num_microbatches)))
    return [tree_unflatten([column[index] for column in columns], structure) for index in range(num_microbatches)]


def split_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], shared: dict[str, Any], num_microbatches: int
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the arguments of the residual functions for each microbatch.

    Raises:
        NotImplementedError: A tensor requires a gradient.
        TypeError: An argument has the wrong type.
        ValueError: A tensor cannot be divided, or an argument is given twice.
    """
    if not isinstance(args, tuple):
        raise TypeError(f"`args` (={describe(args)}) must be a tuple of positional arguments, such as (context,).")
    for name, given in (("kwargs", kwargs), ("shared", shared)):
        if not isinstance(given, dict):
            raise TypeError(f"`{name}` (={describe(given)}) must be a dict of keyword arguments, or None.")
    both = sorted(set(kwargs) & set(shared))
    if both:
        raise ValueError(f"`{both[0]}` is in `kwargs` and in `shared`; pass it once.")
    for leaf in tree_flatten((args, kwargs, shared))[0]:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            raise NotImplementedError(
                "an argument of the residual functions requires a gradient, but each stage would compute only its own "
                "part of it; pass it with `detach()`, or make it part of the activations."
            )
    hint = "pass an argument without a batch dimension, such as a table of positions, in `shared`."
    split_args = split("args", args, num_microbatches, hint)
    split_kwargs = split("kwargs", kwargs, num_microbatches, hint)
    return [(own, {**shared, **named}) for own, named in zip(split_args, split_kwargs, strict=True)]
