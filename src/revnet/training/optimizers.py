"""The optimizers of a run, and the parameters that decay."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from revnet.training.classification.config import TrainConfig
from revnet.training.schedules import cosine_decay

_ADAMW_BETA1 = 0.9
_ADAMW_BETA2 = 0.999
_DECAYED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def optimizer_factory(config: TrainConfig) -> Callable[..., torch.optim.Optimizer]:
    """Return a function that makes the optimizer of `config` from parameters or parameter groups.

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


def adamw_factory(*, lr: float, beta2: float, weight_decay: float) -> Callable[..., torch.optim.Optimizer]:
    """Return a function that makes AdamW from parameters or parameter groups."""
    return partial(torch.optim.AdamW, lr=lr, betas=(_ADAMW_BETA1, beta2), weight_decay=weight_decay)


def adamw_along_a_cosine(
    model: nn.Module, *, lr: float, beta2: float, weight_decay: float, warmup: float, num_updates: int
) -> OptimizerLRSchedulerConfig:
    """Return AdamW for the parameters of `model`, and a cosine schedule that steps after every update."""
    make_optimizer = adamw_factory(lr=lr, beta2=beta2, weight_decay=weight_decay)
    optimizer = make_optimizer(parameter_groups(model, weight_decay))
    schedule = cosine_decay(optimizer, num_updates=num_updates, warmup=warmup)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters: weights of convolutions and linear layers decay, the others do not.

    References:
        Gomez et al. (2017), the official code: the same weights decay, and neither batch norms nor biases do.
    """
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, _DECAYED)}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
