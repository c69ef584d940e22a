"""Find the largest batch size with which a training step fits a budget."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from revnet._bytes import format_bytes, parse_bytes
from revnet.errors import PredictionError
from revnet.memory.planning._training_step import TrainingStep
from revnet.memory.repeats._short_step import find_short_steps
from revnet.memory.step._optimizer import OptimizerFactory
from revnet.memory.step._run_step import Loss

_MOST_BYTES = 2**53
"""Upper limit of `budget`; with a batch that needs more, counts overflow 64 bits."""


def max_batch_size(
    model: nn.Module,
    *inputs: Any,
    budget: str | int,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: OptimizerFactory | Optimizer | None = None,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    step_in_backward: bool = False,
) -> int:
    """Return the largest batch size at which a training step fits a budget, under the policies that `model` has.

    Steps are predicted, not run. Every input tensor whose first dimension equals the first dimension of the first one
    is taken as part of the batch. If no plan fits its budget, the error of `plan` reports the largest batch under the
    policies that need the least memory.

    Args:
        model: See `predict`.
        inputs: Arguments of the model, with any batch size.
        budget: Most bytes that a step may need, everything counted: "16GiB", "500MB", or a number of bytes.
        kwargs: See `predict`.
        optimizer: See `predict`.
        loss: See `predict`. It is called with outputs of every batch size that is tried.
        autocast: See `predict`.
        dtype: See `predict`.
        device: See `predict`.
        step_in_backward: See `predict`.

    Returns:
        The number of samples; 0 if not even one fits, or not even two with a model that needs two, such as batch norm
            in training. A budget above 8 PiB counts as 8 PiB.

    Raises:
        PredictionError: The model fails on fake tensors.
        ValueError: `budget` is not a number of bytes, or the inputs have no tensor or do not make a step larger.
    """
    budget_bytes = min(parse_bytes(budget), _MOST_BYTES)
    step = TrainingStep(model, inputs, dict(kwargs or {}), optimizer, loss, autocast, dtype, device, step_in_backward)
    return largest_batch(step, budget_bytes)


def largest_batch(step: TrainingStep, budget_bytes: int, most: int | None = None) -> int:
    """Return the largest batch size, up to `most`, that fits under the current policies; 0 if none fits.

    The peak is nearly linear in the batch size. So the search follows the line through two known peaks, within a
    bracket of a size that fits and one that does not.
    """
    if not step.tensors:
        raise ValueError("`inputs` hold no tensor, so the batch size cannot change; pass the model's inputs.")
    peaks: dict[int, int] = {}
    low, high = 0, None if most is None else most + 1
    fitting = 0
    guess = min(step.num_samples, most or 2**62)
    while high is None or high - low > 1:
        try:
            with step.with_batch_size(guess).predicted(find_short_steps(step.model)) as prediction:
                peaks[guess] = prediction.memory().peak_bytes
        except (PredictionError, TypeError, ValueError):
            if guess > 1 or not peaks:
                raise
            low = guess  # One sample is too small for the model, as for batch norm, while a larger batch works.
        else:
            if peaks[guess] <= budget_bytes:
                low = fitting = guess
                _check_growth(step, guess, budget_bytes)
            else:
                high = guess
        guess = _next_guess(peaks, budget_bytes, low, high)
    return fitting


def _check_growth(step: TrainingStep, count: int, budget_bytes: int) -> None:
    """Raise if more samples fit than the budget has bytes, so that the search would not end."""
    if count > budget_bytes:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in step.tensors)
        raise ValueError(
            f"`inputs` (of shape {shapes}) do not make a step larger: even {count:,} samples fit `budget` "
            f"(={format_bytes(budget_bytes)}); pass tensors with elements, whose first dimension is the batch."
        )


def _next_guess(peaks: Mapping[int, int], budget_bytes: int, low: int, high: int | None) -> int:
    """Return where the line through the two known peaks nearest to the budget meets it, within the bracket."""
    if len(peaks) == 1:
        ((count, peak),) = peaks.items()
        guess = count * 2 if peak <= budget_bytes else count // 2
    else:
        (count1, peak1), (count2, peak2) = sorted(peaks.items(), key=lambda item: abs(item[1] - budget_bytes))[:2]
        slope = (peak2 - peak1) / (count2 - count1)
        guess = count1 + math.floor((budget_bytes - peak1) / slope) if slope > 0 else low * 2
        if guess in peaks:  # the line is right; the next size up or down closes the bracket
            guess += 1 if guess == low else -1
    most = low * 64 + 64 if high is None else high - 1
    return max(low + 1, min(guess, most))
