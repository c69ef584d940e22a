"""The optimizers of a run, and the parameters that decay."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

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


class AdamWSettings(Protocol):
    """The settings that the densities and the language models have in common."""

    @property
    def lr(self) -> float:
        """Highest learning rate."""

    @property
    def warmup(self) -> float:
        """Share of all updates in which the learning rate rises from zero."""

    @property
    def beta2(self) -> float:
        """Decay rate of the average of squared gradients."""

    @property
    def weight_decay(self) -> float:
        """Decay of the weights of convolutions and linear layers."""


def adamw_factory(config: AdamWSettings) -> Callable[..., torch.optim.Optimizer]:
    """Return a function that makes AdamW from parameters or parameter groups."""
    betas = (_ADAMW_BETA1, config.beta2)
    return partial(torch.optim.AdamW, lr=config.lr, betas=betas, weight_decay=config.weight_decay)


def adamw_along_a_cosine(model: nn.Module, config: AdamWSettings, num_updates: int) -> OptimizerLRSchedulerConfig:
    """Return AdamW for the parameters of `model`, and a cosine schedule that steps after every update."""
    optimizer = adamw_factory(config)(parameter_groups(model, config.weight_decay))
    schedule = cosine_decay(optimizer, num_updates=num_updates, warmup=config.warmup)
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
