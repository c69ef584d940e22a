"""What a measured drift comes to, in words, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from revnet.numerics._drift import BlockDrift, Drift

Level = Literal["kept", "exact", "sound", "noticeable", "wrong", "broken"]

SOUND_BELOW = 1e-3
"""The relative error of activations below which training takes the gradients for true."""
WRONG_ABOVE = 1e-2
"""That from which on it does not; the engine warns there."""
_STRONG = 1.5
"""An amplification by which thirty blocks make an error out of the rounding of float32."""

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def level_of(drift: Drift) -> Level:
    """The verdict in a word; of activations and, if they were measured, of gradients, by whichever is worse."""
    errors = [block.error for block in drift.blocks if block.error is not None]
    if not errors:
        return "kept"
    if not all(map(math.isfinite, errors)):
        return "broken"
    worst = max(errors)
    if drift.gradient is not None:
        worst = max(worst, drift.gradient.relative_error)
    if worst == 0:
        return "exact"
    return "sound" if worst < SOUND_BELOW else "noticeable" if worst < WRONG_ABOVE else "wrong"


_OPENINGS = {"sound": "Sound", "noticeable": "Noticeable", "wrong": "Wrong"}


def verdict_on(drift: Drift) -> str:
    """The verdict in a sentence or two."""
    level, worst = level_of(drift), drift.worst
    if level == "kept" or worst is None or worst.error is None:
        return "Kept: nothing is rebuilt, so activations and gradients are plain autograd's."
    if level == "exact":
        return "Exact: all streams come back to the last bit, and gradients are those of stored activations."
    where = f"what `{worst.name or 'the block'}` was given"
    if level == "broken":
        return (
            f"Broken: {where} holds NaN or inf when it is rebuilt, and so do gradients of it and of what lies before."
        )
    return (
        f"{_OPENINGS[level]}: {where} comes back with a relative error of {worst.error:.2g}, the largest of all "
        f"blocks{_growth(drift)}. {_gradients(drift, level)}"
    )


def _gradients(drift: Drift, level: Level) -> str:
    if drift.gradient is not None:
        error, angle = drift.gradient.relative_error, drift.gradient.angle_degrees
        return f"The gradient of the model is off by {error:.2g}, an angle of {angle:.2g} degrees."
    if level == "sound":
        return "Gradients are off by no more than training notices."
    return "Gradients of that block, and of what lies before it, are off by as much or more."


def _growth(drift: Drift) -> str:
    handed_on = drift.amplifications()
    if drift.amplification is None or not handed_on:
        return ""
    most, factor = max(handed_on, key=lambda pair: pair[1])
    return f"; undoing a block multiplies errors by {drift.amplification:.2g} on average, `{most.name}` by {factor:.2g}"


_BOUND_IT = (
    "Bound the error: `revnet.nn.set_tolerance(model, 1e-3)` keeps streams where it takes that; "
    "`revnet train --tolerance`."
)


def advice_on(drift: Drift) -> tuple[str, ...]:
    """What to do, the least effort first."""
    level = level_of(drift)
    if level in ("kept", "exact"):
        return ()
    if any(block.is_exact and block.error for block in drift.blocks):
        return (
            "Find what gives other numbers when it runs again, for the couplings are exact: "
            "`revnet.numerics.find_nondeterministic(model, x)` names it, and "
            "`torch.use_deterministic_algorithms(True)` mends most of it.",
        )
    if level == "sound":
        return ()
    advice = []
    if drift.dtype in _LOW_PRECISION:
        advice.append(
            f"Keep the streams in float32, for these are {str(drift.dtype).removeprefix('torch.')}: give the model "
            "float32 inputs, and let `torch.autocast` compute residual functions in low precision."
        )
    if drift.tolerance is not None:
        advice.append(
            f"Tighten the tolerance, {drift.tolerance:g}, for this model makes more of an error in its gradients than "
            "it is in activations."
        )
    else:
        advice.append(_BOUND_IT)
    advice.append(
        "Or reverse exactly, on a fixed-point grid: `revnet.nn.set_coupling(model, FixedPoint())`; "
        "`revnet train --exact`."
    )
    spacing = _spacing(drift)
    if spacing == 0:
        advice.append("Or compute again from kept streams: `set_policy(model, Checkpoint())`.")
    elif spacing is not None:
        advice.append(
            f"Or keep streams yourself: `Checkpoint()` as the policy of every {_ordinal(spacing + 1)} block, since "
            f"errors pass {SOUND_BELOW:g} when {spacing + 1} in a row are undone."
        )
    if (drift.amplification or 0) > _STRONG:
        advice.append(
            "Tame the blocks, so that undoing them amplifies less: normalise inside residual functions, scale down "
            "what they return, or train with `revnet.numerics.conditioning_penalty`."
        )
    return tuple(advice)


def _spacing(drift: Drift) -> int | None:
    """How many blocks in a row can be undone before the error is no longer sound; None if all can."""
    counts = []
    for run in rebuilt_runs(drift):
        for count, block in enumerate(reversed(run)):
            if block.error is None or not block.error < SOUND_BELOW:
                counts.append(count)
                break
    return min(counts, default=None)


def rebuilt_runs(drift: Drift) -> Iterator[list[BlockDrift]]:
    """Blocks that were rebuilt one from the other."""
    run: list[BlockDrift] = []
    for block in drift.blocks:
        if block.error is not None:
            run.append(block)
        if run and (block.error is None or block.amplification is None):  # a kept stream behind it
            yield run
            run = []
    if run:
        yield run


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
