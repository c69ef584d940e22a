"""The callbacks that the settings of a run ask for."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch.optim.lr_scheduler import ReduceLROnPlateau

from revnet.training.run import run_dir
from revnet.training.run.profile import ProfileUpdates
from revnet.training.run.task import AbstractTask
from revnet.training.run.weight_average import WeightAverage
from revnet.training.settings.run_config import AbstractRunConfig


class Patience(EarlyStopping):
    """Lightning's early stopping, which also stops a run that is resumed after it had stopped."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once if the patience was used up before."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class PlateauStep(Callback):
    """Step the schedule that follows validations.

    Lightning would count the ends of epochs. A callback, unlike a hook of the task, runs before the checkpoint is
    saved.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower the learning rate if the validations have stopped to improve."""
        assert isinstance(pl_module, AbstractTask)
        for entry in trainer.lr_scheduler_configs:
            if isinstance(entry.scheduler, ReduceLROnPlateau):
                entry.scheduler.step(trainer.callback_metrics[pl_module.best_epoch.metric])


def recipe_callbacks(config: AbstractRunConfig, task: AbstractTask, folder: Path, *, quiet: bool) -> list[Callback]:
    """Return the callbacks for the average of the weights, early stopping, the schedule `plateau` and the profile."""
    callbacks: list[Callback] = []
    if config.ema_decay is not None:
        callbacks.append(WeightAverage(config.ema_decay))
    if config.patience is not None:
        metric, is_highest = task.best_epoch
        mode = "max" if is_highest else "min"
        callbacks.append(Patience(metric, patience=config.patience, mode=mode, min_delta=0.0, check_finite=False))
    if config.schedule == "plateau":
        callbacks.append(PlateauStep())
    if config.profile:
        callbacks.append(ProfileUpdates(folder / run_dir.PROFILE, quiet=quiet))
    return callbacks
