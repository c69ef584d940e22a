"""The optimizers of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from revnet.training.config import TrainConfig

_ADAMW_BETA2 = 0.999


def optimizer_factory(config: TrainConfig) -> Callable[..., torch.optim.Optimizer]:
    """What makes the optimizer of `config` from parameters, or from groups of them with a weight decay each.

    References:
        Loshchilov and Hutter (2019), Decoupled Weight Decay Regularization: AdamW.
    """
    if config.optimizer == "adamw":
        betas = (config.momentum, _ADAMW_BETA2)
        return partial(torch.optim.AdamW, lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    return partial(
        torch.optim.SGD,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
