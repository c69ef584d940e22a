"""A Lightning callback that moves the coefficients of converted blocks."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from revnet.conversion import ConversionSchedule, set_method
from revnet.conversion._schedule import check_schedule


class ConversionCallback(Callback):
    """Set the method of the converted blocks of any LightningModule before each update, by a schedule.

    The update is `trainer.global_step`, so that a resumed run continues the schedule.

    Args:
        schedule: The schedule.

    Raises:
        TypeError: `schedule` is not a `ConversionSchedule`.
        ValueError: At the first batch, the module has no converted blocks.
    """

    def __init__(self, schedule: ConversionSchedule) -> None:
        check_schedule(schedule)
        self.schedule = schedule

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the method of the update that this batch belongs to."""
        set_method(pl_module, self.schedule.method_at(trainer.global_step))
