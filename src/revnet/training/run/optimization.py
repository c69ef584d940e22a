"""The optimizer and the schedule of a run, in the form that Lightning takes."""

from typing import Any

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from revnet.optim import StepInBackward
from revnet.training.optimizers import make_optimizer
from revnet.training.schedules import constant_rate, cosine_decay, cosine_restarts, linear_warmup, step_decay
from revnet.training.settings.run_config import AbstractRunConfig


def configure_optimization(
    config: AbstractRunConfig, model: nn.Module, num_updates: int, *, metric: str, is_highest: bool
) -> OptimizerLRScheduler:
    """Return the optimizer of `config` for `model`, and its schedule.

    Args:
        config: Settings of the run.
        model: The network.
        num_updates: Updates of the whole run.
        metric: Name of the metric that the schedule `plateau` watches.
        is_highest: Whether the highest value of the metric is the best.
    """
    optimizer = make_optimizer(config, model)
    if config.step_in_backward:
        _clip_each_gradient(optimizer, config.max_grad_value)
        StepInBackward(optimizer)  # the optimizer keeps it
    if config.schedule != "plateau":
        schedule = _schedule(config, optimizer, num_updates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # as other schedules do, so that a resumed run can change it
    plateau = ReduceLROnPlateau(
        optimizer,
        mode="max" if is_highest else "min",
        factor=config.decay_factor,
        patience=config.plateau_patience,
    )
    # Lightning keeps its state; a callback steps it after a validation. A warm-up that multiplies the rate leaves it
    # alone afterwards, unlike one that computes it from the highest rate.
    schedules: list[Any] = [{"scheduler": plateau, "monitor": metric, "strict": False}]
    if round(config.warmup * num_updates):
        rise = linear_warmup(optimizer, num_updates=num_updates, warmup=config.warmup)
        schedules.append({"scheduler": rise, "interval": "step"})
    return [optimizer], schedules


def _clip_each_gradient(optimizer: Optimizer, largest: float | None) -> None:
    """Clip the elements of each gradient when it is known, before a hook that is registered later uses it."""
    if largest is None:
        return

    def clip(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.clamp_(-largest, largest)

    # FSDP2 calls these hooks for divided parameters, but not the ones of `Tensor.register_hook`.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(clip)


def _schedule(config: AbstractRunConfig, optimizer: Optimizer, num_updates: int) -> LambdaLR:
    warmup = config.warmup
    match config.schedule:
        case "step":
            return step_decay(
                optimizer,
                num_updates=num_updates,
                decay_at=config.decay_at,
                decay_factor=config.decay_factor,
                warmup=warmup,
            )
        case "restarts":
            return cosine_restarts(
                optimizer,
                num_updates=num_updates,
                num_cycles=config.num_cycles,
                cycle_growth=config.cycle_growth,
                warmup=warmup,
            )
        case "constant":
            return constant_rate(optimizer, num_updates=num_updates, warmup=warmup)
    return cosine_decay(optimizer, num_updates=num_updates, warmup=warmup)
