"""The learning rates of a resumed run, which follow its settings and not the ones of the checkpoint."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR


class CurrentRates(Callback):
    """Let a resumed run follow its own highest rate and length, which may have changed since the checkpoint.

    A checkpoint restores the rates that it was saved with. Where nothing has changed, they stay as they are to the last
    bit.

    A schedule that waits for a metric to improve steps after the checkpoint of an epoch is saved. This callback keeps
    the metric, and makes that step again.
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._highest: list[list[float]] = []
        self._metrics: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the trainer."""
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics that schedules wait for, at the end of an epoch."""
        assert self._trainer is not None
        epoch: Any = self._trainer.fit_loop.epoch_progress.current
        if epoch.processed < epoch.ready:
            return {"metrics": {}}
        names = [config.monitor for config in self._trainer.lr_scheduler_configs if config.reduce_on_plateau]
        metrics = self._trainer.callback_metrics
        return {"metrics": {name: float(metrics[name]) for name in names if name in metrics}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the metrics until training starts."""
        self._metrics = state_dict["metrics"]

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
            elif config.reduce_on_plateau and config.monitor in self._metrics:
                schedule.step(self._metrics[config.monitor])
        self._metrics = {}
