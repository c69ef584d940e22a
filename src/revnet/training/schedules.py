"""Schedules over the updates of a run: the learning rate, and the size of the training images."""

import math
from bisect import bisect_right
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR

_SIZE_STEP = 4
"""Number of pixels by which images grow at a time, one pixel in the last stage of a CIFAR network."""


def step_decay(
    optimizer: Optimizer, *, num_updates: int, decay_at: Sequence[float], decay_factor: float, warmup: float = 0.0
) -> LambdaLR:
    """Multiply the learning rate by `decay_factor` at each of the fractions `decay_at` of the run.

    With 80,000 updates and `decay_at=(0.5, 0.75)` this is the paper's schedule: 0.1, then 0.01 from update 40,000, then
    0.001 from update 60,000. Call `step` after every update, not after every epoch.

    Args:
        optimizer: Optimizer, with the highest learning rate of the run.
        num_updates: Number of updates in the whole run.
        decay_at: Fractions of the run, in ascending order.
        decay_factor: Factor that the rate is multiplied by.
        warmup: Fraction of the run in which the rate first rises linearly.

    References:
        Gomez et al. (2017), The Reversible Residual Network, section 4.
    """
    milestones = [max(1, round(fraction * num_updates)) for fraction in decay_at]  # the first update has the full rate
    rise = round(warmup * num_updates)
    return LambdaLR(optimizer, lambda update: _rise(update, rise) * decay_factor ** bisect_right(milestones, update))


def cosine_decay(optimizer: Optimizer, *, num_updates: int, warmup: float = 0.0) -> LambdaLR:
    """Raise the learning rate linearly over the fraction `warmup` of the run, then lower it to zero along a cosine.

    The rate is zero only after the last update.

    References:
        Loshchilov and Hutter (2017), SGDR: Stochastic Gradient Descent with Warm Restarts, equation 5 (no restarts).
        Goyal et al. (2017), Accurate, Large Minibatch SGD, section 2.2: the warm-up.
    """
    rise = round(warmup * num_updates)

    def factor(update: int) -> float:
        fall = (update - rise) / max(1, num_updates - rise)
        return _rise(update, rise) if update < rise else (1 + math.cos(math.pi * min(fall, 1.0))) / 2

    return LambdaLR(optimizer, factor)


def constant_rate(optimizer: Optimizer, *, num_updates: int, warmup: float = 0.0) -> LambdaLR:
    """Raise the learning rate linearly over the fraction `warmup` of the run, then keep it."""
    rise = round(warmup * num_updates)
    return LambdaLR(optimizer, lambda update: _rise(update, rise))


def cosine_restarts(
    optimizer: Optimizer, *, num_updates: int, num_cycles: int, cycle_growth: float = 1.0, warmup: float = 0.0
) -> LambdaLR:
    """Lower the learning rate along `num_cycles` half cosines, one after another, each from the highest rate.

    Args:
        optimizer: Optimizer, with the highest learning rate of the run.
        num_updates: Number of updates in the whole run.
        num_cycles: Number of cycles.
        cycle_growth: Length of a cycle, as a multiple of the cycle before.
        warmup: Fraction of the run in which the rate first rises linearly, before the first cycle.

    References:
        Loshchilov and Hutter (2017), SGDR: Stochastic Gradient Descent with Warm Restarts, section 3.
    """
    rise = round(warmup * num_updates)
    weights = [cycle_growth**cycle for cycle in range(num_cycles)]
    ends = [sum(weights[: cycle + 1]) / sum(weights) for cycle in range(num_cycles)]
    starts = [rise + round(end * (num_updates - rise)) for end in (0.0, *ends)]

    def factor(update: int) -> float:
        if update < rise:
            return _rise(update, rise)
        cycle = min(bisect_right(starts, update), num_cycles) - 1
        fall = (update - starts[cycle]) / max(1, starts[cycle + 1] - starts[cycle])
        return (1 + math.cos(math.pi * min(fall, 1.0))) / 2

    return LambdaLR(optimizer, factor)


def linear_warmup(optimizer: Optimizer, *, num_updates: int, warmup: float) -> LinearLR:
    """Raise the learning rate linearly over the fraction `warmup` of the run, and leave it to others from then on."""
    rise = round(warmup * num_updates)
    return LinearLR(optimizer, start_factor=1 / (rise + 1), total_iters=rise)


def progressive_size(progress: float, *, start_size: int, full_size: int, full_size_at: float) -> int:
    """Return the side of the training images at the fraction `progress` of the run.

    The side grows linearly from `start_size` in steps of 4 pixels, and is `full_size` from `full_size_at` on.

    References:
        Howard (2018), Training Imagenet in 3 hours for USD 25; and CIFAR10 for USD 0.26: progressive resizing.
    """
    num_steps = -(-(full_size - start_size) // _SIZE_STEP)
    step = math.floor(num_steps * progress / full_size_at)
    return min(start_size + _SIZE_STEP * step, full_size)


def _rise(update: int, num_updates: int) -> float:
    return min(1.0, (update + 1) / (num_updates + 1))
