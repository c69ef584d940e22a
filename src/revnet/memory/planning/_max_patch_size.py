"""Find the largest image, volume or sequence with which a training step fits a budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from revnet._bytes import parse_bytes
from revnet._checks import check_count, describe, is_integer
from revnet.errors import PredictionError
from revnet.memory.planning._max_batch_size import _MOST_BYTES
from revnet.memory.planning._resized import resized
from revnet.memory.planning._training_step import TrainingStep
from revnet.memory.step._optimizer import OptimizerFactory
from revnet.memory.step._run_step import Loss


def max_patch_size(
    model: nn.Module,
    *inputs: Any,
    budget: str | int,
    dims: Sequence[int] | None = None,
    multiple: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: OptimizerFactory | Optimizer | None = None,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    step_in_backward: bool = False,
) -> int:
    """Return the largest side of the inputs at which a training step fits a budget, under the policies of `model`.

    Steps are predicted, not run. The sides in `dims` are equal, as in a square image or a cubic patch; all other sizes
    stay as they are in `inputs`. The next larger side, by `multiple`, does not fit.

    Args:
        model: See `predict`.
        inputs: Arguments of the model, with any sides that it accepts. The first tensor that has the dimensions `dims`
            counts. Tensors that have the same sizes in these dimensions, such as a mask of each voxel, change too.
        budget: Most bytes that a step may need, everything counted: "16GiB", "500MB", or a number of bytes.
        dims: Dimensions that change, counted with the batch. None means all after the second, the channels. `(1,)`
            finds the longest sequence of (B, T), and `(3, 4)` keeps the depth of a volume.
        multiple: Number of which the side is a multiple. None means the model's `size_multiple`, which models of
            images and volumes in this library have, or 1.
        kwargs: See `predict`.
        optimizer: See `predict`.
        loss: See `predict`. It is called with outputs of every size that is tried.
        autocast: See `predict`.
        dtype: See `predict`.
        device: See `predict`.
        step_in_backward: See `predict`.

    Returns:
        The side; 0 if not even the smallest that the model accepts fits. A budget above 8 PiB counts as 8 PiB.

    Raises:
        PredictionError: The model fails on fake tensors, or on a larger side than the sides of `inputs`.
        TypeError: An argument has the wrong type.
        ValueError: `budget` is not a number of bytes, no input has the dimensions, or a number is not positive.
    """
    budget_bytes = min(parse_bytes(budget), _MOST_BYTES)
    if multiple is None:
        multiple = getattr(model, "size_multiple", 1)
    check_count("multiple", multiple, hint="16 suits a network that halves its input four times")
    step = TrainingStep(model, inputs, dict(kwargs or {}), optimizer, loss, autocast, dtype, device, step_in_backward)
    return largest_patch(step, budget_bytes, dims, multiple)


def largest_patch(step: TrainingStep, budget_bytes: int, dims: Sequence[int] | None, multiple: int) -> int:
    """Return the largest side in `dims` that fits under the current policies; 0 if none fits.

    The peak is nearly linear in the number of positions, so the search follows the line through two known peaks, within
    a bracket of a side that fits and one that does not.
    """
    first, dims = _choose_dims(step, dims)
    peaks: dict[int, int] = {}
    low, high = 0, None
    fitting = 0
    guess = max(first.shape[dims[0]] // multiple, 1)
    while high is None or high - low > 1:
        try:
            peak = _peak_bytes(step, first, dims, guess * multiple)
        except PredictionError as error:
            if not peaks and all(first.shape[dim] == guess * multiple for dim in dims):
                raise  # the fault of the model, not of the sides
            if not peaks or guess > min(peaks):
                raise _explain(error, guess * multiple, max(peaks, default=0) * multiple) from error
            low = guess  # too small for the model, while a larger side works
        else:
            if peak is not None:
                peaks[guess] = peak
            if peak is not None and peak <= budget_bytes:
                low = fitting = guess
            else:
                high = guess
        guess = _next_guess(peaks, budget_bytes, low, high, len(dims))
    return fitting * multiple


def _choose_dims(step: TrainingStep, dims: Any) -> tuple[Tensor, tuple[int, ...]]:
    """Return the tensor that counts and the dimensions that change, from the end if they were not given."""
    if dims is not None:
        if not isinstance(dims, Sequence) or not dims or not all(is_integer(dim) for dim in dims):
            raise TypeError(f"`dims` (={describe(dims)}) must be dimensions of the inputs, such as (2, 3, 4), or None.")
        needed = max(dim + 1 if dim >= 0 else -dim for dim in dims)
    else:
        needed = 3
    first = next((tensor for tensor in step.tensors if tensor.dim() >= needed), None)
    if first is None:
        shown = "`dims` (=None), all after the channels," if dims is None else f"`dims` (={describe(dims)})"
        raise ValueError(
            f"{shown} must be dimensions of an input, but no input has {needed}; pass `dims=(1,)` for sequences (B, T)."
        )
    if dims is None:
        return first, tuple(range(2 - first.dim(), 0))
    if len({dim % first.dim() for dim in dims}) < len(dims):
        raise ValueError(f"`dims` (={describe(dims)}) must be different dimensions; name each one once.")
    return first, tuple(dims)


def _peak_bytes(step: TrainingStep, first: Tensor, dims: Sequence[int], side: int) -> int | None:
    """Return the peak at a side; None if the bytes of a tensor overflow 64 bits."""
    try:
        resized = _with_side(step, first, dims, side)
    except (RuntimeError, TypeError):  # the number of elements overflows, or the side itself
        return None
    try:
        with resized.predicted() as prediction:
            return prediction.memory().peak_bytes
    except PredictionError as error:
        if "overflow" in str(error):
            return None
        raise


def _with_side(step: TrainingStep, first: Tensor, dims: Sequence[int], side: int) -> TrainingStep:
    """Return the same step on inputs with other sides, as meta tensors."""
    sizes = [first.shape[dim] for dim in dims]

    def resize(tensor: Tensor) -> Tensor:
        if not all(-tensor.dim() <= dim < tensor.dim() for dim in dims):
            return tensor
        if [tensor.shape[dim] for dim in dims] != sizes:
            return tensor
        shape = list(tensor.shape)
        for dim in dims:
            shape[dim] = side
        return resized(tensor, shape)

    args, kwargs = tree_map_only(Tensor, resize, (step.args, step.kwargs))
    return replace(step, args=args, kwargs=kwargs, device=step.device or step.model_device)


def _next_guess(peaks: Mapping[int, int], budget_bytes: int, low: int, high: int | None, power: int) -> int:
    """Return where the line through the two known peaks nearest to the budget meets it, within the bracket.

    The peaks are a line over the number of positions, the side to the `power`.
    """
    most = low * 4 + 4 if high is None else high - 1
    if not peaks:
        guess = most // 2
    elif len(peaks) == 1:
        ((side, peak),) = peaks.items()
        guess = side * 2 if peak <= budget_bytes else side // 2
    elif high is not None and len(peaks) > 5 and len(peaks) % 2:
        guess = (low + high) // 2  # Where the peak grows in steps, the line is a poor guide.
    else:
        (side1, peak1), (side2, peak2) = sorted(peaks.items(), key=lambda item: abs(item[1] - budget_bytes))[:2]
        slope = (peak2 - peak1) / (side2**power - side1**power)
        positions = side1**power + (budget_bytes - peak1) / slope if slope > 0 else float(most**power)
        guess = math.floor(max(positions, 1) ** (1 / power) + 1e-9)
        if guess in peaks:  # the line is right; the next side up or down closes the bracket
            guess += 1 if guess == low else -1
    return max(low + 1, min(guess, most))


def _explain(error: PredictionError, side: int, working: int) -> PredictionError:
    """Return an error that says at which side the model fails."""
    works = f"works with sides up to {working}, but fails" if working else "fails"
    return PredictionError(
        f"The model {works} with sides of {side}; `multiple` sets the steps and `dims` the sides that change. {error}"
    )
