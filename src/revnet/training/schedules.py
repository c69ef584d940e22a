"""Learning rates over the updates of a run."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR


def step_decay(
    optimizer: Optimizer, *, num_updates: int, decay_at: Sequence[float], decay_factor: float
) -> MultiStepLR:
    """Multiply the learning rate by `decay_factor` at each of the fractions `decay_at` of the run.

    With 80,000 updates and `decay_at=(0.5, 0.75)` this is the paper's schedule: 0.1, then 0.01 from update 40,000, then
    0.001 from update 60,000. Call `step` after every update, not after every epoch.

    References:
        Gomez et al. (2017), The Reversible Residual Network, section 4.
    """
    milestones = [round(fraction * num_updates) for fraction in decay_at]
    return MultiStepLR(optimizer, milestones, gamma=decay_factor)
