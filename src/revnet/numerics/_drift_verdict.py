"""Judge a drift in words, and give advice."""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from revnet.numerics._block_drift import BlockDrift, GradientDrift, amplifications, mean_amplification, worst_block

Level = Literal["kept", "exact", "sound", "noticeable", "wrong", "broken"]

SOUND_BELOW = 1e-3
"""Relative error of activations or gradients below which training is not affected."""
WRONG_ABOVE = 1e-2
"""Relative error from which on training is affected; the engine warns there."""
_STRONG = 1.5
"""Strong amplification: at this factor, 30 blocks turn float32 rounding into a 1 % error."""

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def level_of(blocks: Sequence[BlockDrift], gradient: GradientDrift | None) -> Level:
    """Return the verdict as one word, for activations or gradients, whichever are worse."""
    errors = [block.error for block in blocks if block.error is not None]
    if not errors:
        return "kept"
    if not all(map(math.isfinite, errors)):
        return "broken"
    worst = max(errors)
    if gradient is not None:
        worst = max(worst, gradient.relative_error)
    if worst == 0:
        return "exact"
    return "sound" if worst < SOUND_BELOW else "noticeable" if worst < WRONG_ABOVE else "wrong"


_OPENINGS = {"sound": "Sound", "noticeable": "Noticeable", "wrong": "Wrong"}


def verdict_on(blocks: Sequence[BlockDrift], gradient: GradientDrift | None) -> str:
    """Return the verdict in one or two sentences."""
    level, worst = level_of(blocks, gradient), worst_block(blocks)
    if level == "kept" or worst is None or worst.error is None:
        return "Kept: nothing is rebuilt, so activations and gradients equal plain autograd's."
    if level == "exact":
        return "Exact: all streams are rebuilt to the last bit, so gradients equal the gradients of stored activations."
    where = f"the input of `{worst.name or 'the block'}`"
    if level == "broken":
        return (
            f"Broken: {where} is rebuilt with NaN or inf, so gradients of this block and of all earlier ones are wrong."
        )
    return (
        f"{_OPENINGS[level]}: {where} is rebuilt with a relative error of {worst.error:.2g}, the largest of all "
        f"blocks{_growth(blocks)}. {_gradients(gradient, level)}"
    )


def _gradients(gradient: GradientDrift | None, level: Level) -> str:
    if gradient is not None:
        error, angle = gradient.relative_error, gradient.angle_degrees
        return f"The gradient of the model is off by {error:.2g}, an angle of {angle:.2g} degrees."
    if level == "sound":
        return "The error in the gradients is too small to affect training."
    return "Gradients of this block and all earlier ones have errors of this size or larger."


def _growth(blocks: Sequence[BlockDrift]) -> str:
    mean = mean_amplification(blocks)
    if mean is None:
        return ""
    strongest, factor = max(amplifications(blocks), key=lambda pair: pair[1])
    return f"; undoing a block multiplies errors by {mean:.2g} on average, and by {factor:.2g} at `{strongest.name}`"


def advice_on(
    blocks: Sequence[BlockDrift], gradient: GradientDrift | None, dtype: torch.dtype | None, tolerance: float | None
) -> tuple[str, ...]:
    """Return ways to reduce the drift, the easiest first."""
    level = level_of(blocks, gradient)
    if level in ("kept", "exact"):
        return ()
    if any(block.is_exact and block.error for block in blocks):
        return (
            "The couplings are exact, so a residual function must have returned different values when it ran again. "
            "`revnet.numerics.find_nondeterministic(model, x)` names it, and "
            "`torch.use_deterministic_algorithms(True)` fixes most cases.",
        )
    if level == "sound":
        return ()
    advice = []
    if dtype in _LOW_PRECISION:
        advice.append(
            f"Keep the streams in float32; they are {str(dtype).removeprefix('torch.')} now. Give the model float32 "
            "inputs, and let `torch.autocast` run the residual functions in low precision."
        )
    blamed = _blamed(blocks)
    converted = [block for block in blamed if block.remedies is not None]
    has_others = len(converted) < len(blamed)
    remedies = dict.fromkeys(remedy for block in converted for remedy in block.remedies or ())
    others = _for_sequences(tolerance) if has_others else []
    advice += [f"Converted blocks: {_lowered(remedy)}" for remedy in remedies] if has_others else remedies
    advice += [f"Other blocks: {_lowered(sentence)}" for sentence in others] if converted else others
    advice.append("Or recompute from kept streams: `revnet.nn.set_policy(model, Checkpoint())`.")
    if has_others and (mean_amplification(blocks) or 0) > _STRONG:
        advice.append(
            "Or change the blocks so that undoing them amplifies less: normalize inside the residual functions, scale "
            "down their outputs, or train with `revnet.numerics.conditioning_penalty`."
        )
    first = advice[0].removeprefix("Or ")
    return first[0].upper() + first[1:], *advice[1:]


def _lowered(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _blamed(blocks: Sequence[BlockDrift]) -> list[BlockDrift]:
    """Return the blocks whose inputs are off, or all that are rebuilt with an error, if only gradients are off."""
    inexact = [(block, block.error) for block in blocks if block.error is not None and not block.is_exact]
    # NaN is not below anything.
    off = [block for block, error in inexact if not error < SOUND_BELOW]
    return off or [block for block, _ in inexact]


def _for_sequences(tolerance: float | None) -> list[str]:
    """Return what helps the blocks of sequences."""
    if tolerance is None:
        bound = (
            "Bound the error: `revnet.nn.set_tolerance(model, 1e-3)` or `revnet train --tolerance` keeps streams where "
            "the bound requires it."
        )
    else:
        bound = (
            f"Tighten the tolerance of {tolerance:g}, since this model turns errors of activations into larger errors "
            "of gradients."
        )
    return [
        bound,
        "Or reverse exactly, on a fixed-point grid: `revnet.nn.set_coupling(model, FixedPoint())` or "
        "`revnet train --exact`.",
    ]
