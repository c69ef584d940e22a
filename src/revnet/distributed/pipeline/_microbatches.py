"""Divide a batch into microbatches, and average their losses."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from revnet._checks import describe
from revnet.distributed.pipeline._stage_module import StageModule

Input = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""Microbatch, with the positional and keyword arguments of the residual functions."""
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
"""Integers of each size in bytes."""


def split(name: str, value: Any, num_microbatches: int, hint: str = "") -> list[Any]:
    """Return the microbatches of a batch: views of its tensors along the first dimension. Other values are repeated.

    Args:
        name: The name of the argument, for error messages.
        value: A tensor, or a tuple or dict of tensors and plain values, at any depth.
        num_microbatches: The number of microbatches.
        hint: The end of the error message.

    Raises:
        TypeError: There is a value of another kind.
        ValueError: The first dimension of a tensor is not a multiple of `num_microbatches`.
    """
    if isinstance(value, tuple) and type(value) is not torch.Size:
        columns = [split(name, entry, num_microbatches, hint) for entry in value]
        return list(zip(*columns, strict=True)) if columns else [()] * num_microbatches
    if isinstance(value, dict):
        rows: list[dict[Any, Any]] = [{} for _ in range(num_microbatches)]
        for key, entry in value.items():
            for row, part in zip(rows, split(name, entry, num_microbatches, hint), strict=True):
                row[key] = part
        return rows
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype):
        return [value] * num_microbatches
    if not isinstance(value, Tensor):
        raise TypeError(
            f"`{name}` contains {describe(value)}, which cannot be divided into microbatches; pass a tensor, or a "
            "tuple or dict of tensors."
        )
    size = value.shape[0] if value.dim() else 0
    if size == 0 or size % num_microbatches:
        raise ValueError(
            f"`{name}` (of shape {tuple(value.shape)}) cannot be divided into `num_microbatches` (={num_microbatches}) "
            "equal parts along its first dimension; "
            + (hint or "pad or shorten the batch, for instance with `drop_last=True` in the DataLoader.")
        )
    return list(value.split(size // num_microbatches))


def joined(outputs: Sequence[Any]) -> Any:
    """Return the output for the whole batch: what `split` has divided, put together again."""
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple([joined(column) for column in zip(*outputs, strict=True)])
    if isinstance(first, dict):
        return {key: joined([output[key] for output in outputs]) for key in first}
    return torch.cat(list(outputs)) if isinstance(first, Tensor) and first.dim() else list(outputs)


def checksum_of(batch: Any) -> str | None:
    """Return a checksum of the tensors in a batch as a string. If the batch contains no tensors, return None."""
    # Sorted, because dicts with the same entries may differ in their order.
    checksums = sorted([_checksum(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)])
    return "; ".join(checksums) or None


def _checksum(x: Tensor) -> str:
    """Return the shape and dtype of a tensor, and a checksum of its values, which is the same on every device."""
    sums: list[int] = []
    if x.numel() > 0 and x.layout is torch.strided:
        flat = x.detach().resolve_conj().resolve_neg().reshape(-1)
        # Sums of bits, because sums of floats would depend on the order, and NaN must equal itself. One for each
        # sample, because the order of the samples counts. Words of 8 bytes need no conversion, and so no memory.
        is_even = flat.nbytes // len(x) % 8 == 0
        if is_even and flat.storage_offset() * flat.itemsize % 8:
            flat = flat.clone()  # `view` needs an aligned start.
        words = flat.view(torch.int64 if is_even else _WORDS[flat.itemsize])
        sums = words.view(len(x), -1).sum(1, dtype=torch.int64).tolist()
    return f"{tuple(x.shape)} {x.dtype} {zlib.crc32(str(sums).encode()):08x}"


def divide(batch: Any, args: Any, kwargs: Any, shared: Any, num_microbatches: int, stage: StageModule) -> list[Input]:
    """Return the microbatches, with the arguments of the residual functions.

    Raises:
        NotImplementedError: A tensor in the arguments requires a gradient.
        TypeError: An argument has the wrong type, or the batch is missing in the first stage.
        ValueError: A tensor cannot be divided, or an argument is given twice.
    """
    if batch is None and stage.is_first:
        raise TypeError("`batch` is None, but the first stage needs it; pass it at least in the process of rank 0.")
    kwargs, shared = {} if kwargs is None else kwargs, {} if shared is None else shared
    if not isinstance(args, tuple):
        raise TypeError(f"`args` (={describe(args)}) must be a tuple of positional arguments, such as (context,).")
    for name, given in (("kwargs", kwargs), ("shared", shared)):
        if not isinstance(given, dict):
            raise TypeError(f"`{name}` (={describe(given)}) must be a dict of keyword arguments, or None.")
    both = sorted(set(kwargs) & set(shared))
    if both:
        raise ValueError(f"`{both[0]}` is in `kwargs` and in `shared`; pass it once.")
    for leaf in tree_leaves((args, kwargs, shared)):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            raise NotImplementedError(
                "an argument of the residual functions requires a gradient, but each stage would compute only its own "
                "part of it; pass it with `detach()`, or make it part of the activations."
            )
    hint = "pass an argument without a batch dimension, such as a table of positions, in `shared`."
    batches = split("batch", batch, num_microbatches)
    split_args = split("args", args, num_microbatches, hint)
    split_kwargs = split("kwargs", kwargs, num_microbatches, hint)
    parts = zip(batches, split_args, split_kwargs, strict=True)
    return [(x, own_args, {**shared, **own_kwargs}) for x, own_args, own_kwargs in parts]


class Losses:
    """The losses of the microbatches of one step, in the last stage.

    Args:
        function: Function that takes the output and the target of a microbatch.
        targets: The targets of the microbatches.
        device: The device of the model.
    """

    def __init__(self, function: Callable[[Any, Any], Tensor], targets: Sequence[Any], device: torch.device):
        self._function, self._targets = function, targets
        self._losses: dict[int, Tensor] = {}
        self.mean = torch.zeros((), dtype=torch.float64, device=device)
        """Mean of the losses, once all of them are computed."""

    def compute(self, number: int, output: Any) -> None:
        """Compute the loss of a microbatch.

        Raises:
            TypeError: The function did not return a tensor with one element.
        """
        loss = self._function(output, self._targets[number])
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(
                f"`loss` returned {describe(loss)}, but must return a tensor with one element, the mean loss of the "
                "microbatch; average it over the samples."
            )
        share = loss / len(self._targets)
        self._losses[number] = share
        self.mean += share.detach().reshape(()).double()

    def take(self, number: int) -> Tensor:
        """Return the share of a microbatch in the mean, once, so that its graph is freed after the backward pass."""
        return self._losses.pop(number)
