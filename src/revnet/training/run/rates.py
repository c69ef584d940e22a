"""The learning rates of a resumed run, which follow its settings and not the ones of the checkpoint."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR


class CurrentRates(Callback):
    """Let a resumed run follow its own highest rate and length, which may have changed since the checkpoint.

    A checkpoint restores the rates that it was saved with. Where nothing has changed, they stay as they are to the last
    bit.
    """

    def __init__(self) -> None:
        self._highest: list[list[float]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the rates of the settings, before a checkpoint replaces them."""
        groups = [optimizer.param_groups for optimizer in trainer.optimizers]
        self._highest = [[group.get("initial_lr", group["lr"]) for group in some] for some in groups]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the rates of the next update."""
        for optimizer, highest in zip(trainer.optimizers, self._highest, strict=True):
            for group, rate in zip(optimizer.param_groups, highest, strict=True):
                before = group.get("initial_lr", rate)
                if before != rate:
                    group["initial_lr"] = rate
                    group["lr"] *= rate / before
        for config in trainer.lr_scheduler_configs:
            schedule: Any = config.scheduler
            if isinstance(schedule, LambdaLR):
                groups = schedule.optimizer.param_groups
                schedule.base_lrs = [group["initial_lr"] for group in groups]
                for group, share in zip(groups, schedule.lr_lambdas, strict=True):
                    group["lr"] = group["initial_lr"] * share(schedule.last_epoch)
